"""The local engine: a federation simulated on one machine, with one resident model.

A round is: draw the cohort from (seed, round); visit each client; refuse what is no update; average
what is shared; let SAL see the global score; score every client's model; write the metrics line;
write the checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import save

from fedms.fl.algorithms import Stage, stages_of
from fedms.fl.client import Visit, received, visit
from fedms.fl.config import Config, SalConfig
from fedms.fl.data.sampling import draw_cohort
from fedms.fl.engines.cohort import side_by_side
from fedms.fl.engines.world import Outcome, World
from fedms.fl.evaluate import (
    Scores,
    common_score,
    evaluate,
    pooled_sample,
    scored_sample,
    spread,
    val_sample,
)
from fedms.fl.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedms.fl.runs.files import replace_file
from fedms.fl.runs.progress import Progress
from fedms.fl.runs.records import RoundRecord, peak_memory_mb
from fedms.fl.runs.states import ClientStates
from fedms.fl.sal import Activation, block_importance, wake_order
from fedms.fl.server import Totals, check_update, require_quorum
from fedms.fl.types import CheckpointError, Failure, Patterns, State, Update, matches, select

LINE_FILES = ("metrics.jsonl", "clients.jsonl")


class Run:
    """One method on one world, written to one folder; goes on from the folder's newest checkpoint.

    Args:
        config: settings; ``config.method`` names the algorithm.
        world: clients and model.
        folder: where metrics and checkpoints go; it exists.
        progress: who is told.
    """

    def __init__(self, config: Config, world: World, folder: Path, progress: Progress) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.world, self.federation, self.model = world, world.federation, world.model
        self.stages = stages_of(config)
        self.total_rounds = sum(stage.settings.rounds for stage in self.stages)
        self.scored = scored_sample(self.federation, config.eval.clients, config.seed)
        self.pooled = pooled_sample(self.federation, config.eval.pooled_examples, config.seed)
        self.validation = val_sample(self.federation, config.eval.val_examples, config.seed)
        self.server: State = {}
        self.clients = ClientStates(folder / "clients")
        self.ids = [client.client_id for client in self.federation.clients]
        self.done = 0
        checkpoints = folder / "checkpoints"
        found = load_checkpoint(checkpoints, self.clients, progress.warn) or self._adopt()
        self.activation = self._activation(found)
        if found is not None:
            self.done, self.server = found.round, found.server
        self.clients.forget_after(self.done)
        self._drop_metrics_after(self.done)

    def execute(self) -> None:
        """Run the rounds that are left."""
        self._wake()
        first = 1
        for stage in self.stages:
            last = first + stage.settings.rounds - 1
            if self.done < last:
                self._enter(stage)
            visited = {
                client_id
                for round in range(first, min(self.done, last) + 1)
                for client_id in self._cohort(stage, round)
            }
            for round in range(max(first, self.done + 1), last + 1):
                self._round(
                    stage, round, visited, round == last or round % self.config.eval.every == 0
                )
            keeps_nothing = not (self.folder / "clients").exists()
            if stage is self.stages[0] and self.done == last and keeps_nothing:
                lines = {name: (self.folder / name).read_text("utf-8") for name in LINE_FILES}
                self.world.outcomes[self._first_stage_key] = Outcome(self._checkpoint([]), lines)
            first = last + 1

    # One round ------------------------------------------------------------------------------------

    def _round(self, stage: Stage, round: int, visited: set[str], score: bool) -> None:
        """One round; ``visited`` are the clients of the stage's earlier ones, and then of this."""
        started = time.perf_counter()
        config, awake = self.config, self.activation.awake
        cohort = self._cohort(stage, round)
        units = len(cohort) + (len(self.scored) if score else 0)
        self.progress.round(config.method, stage.name, round, self.total_rounds, units)
        failed: list[Failure] = []
        returned: list[Update] = []
        written: list[str] = []
        totals = Totals(stage.aggregate)
        bytes_up = 0
        for update in self._visits(stage, cohort, round, failed):
            totals.add(update)
            bytes_up += encoded_size(update.shared)
            if update.kept:
                self.clients.write(update.client_id, round, update.kept)
            returned.append(replace(update, shared={}, kept={}))
            written += [update.client_id] if update.kept else []
        require_quorum(len(cohort), failed, config.server.quorum)
        bytes_down = self._bytes_down(stage, cohort, visited)
        self.server = totals.finish(self.server)
        visited.update(cohort)
        trainable = self._awake(stage.start(self.received(stage), {}), stage.trains)
        if stage.wakes:
            val_score = common_score(
                self.model, stage, self.server, self.federation, self.validation
            )
            if self.activation.observe(val_score):
                self._wake()
        scores = self._score(stage, round) if score else None
        seen = [client for client in scores.clients if client.seen] if scores else []
        unseen = [client for client in scores.clients if not client.seen] if scores else []
        gates = [client.gate_local for client in seen if client.gate_local is not None]
        count = sum(tensor.numel() for tensor in trainable.values())
        record = RoundRecord(
            round=round,
            stage=stage.name,
            seconds=time.perf_counter() - started,
            participants=[update.client_id for update in returned],
            failed=failed,
            awake_blocks=list(awake) if stage.experts else [],
            trainable_parameters=count,
            trainable_share=count / self.model.backbone.parameter_count,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            train_loss=_mean_loss(returned),
            global_accuracy=scores.global_accuracy if scores else None,
            personalized_accuracy=spread([client.accuracy for client in seen]),
            pooled_accuracy=spread([client.pooled_accuracy for client in seen]),
            unseen_accuracy=spread([client.accuracy for client in unseen]),
            gate_local_mean=sum(gates) / len(gates) if gates else None,
            peak_memory_mb=peak_memory_mb(),
        )
        self._write(record, scores)
        self.done = round
        checkpoints, keep = self.folder / "checkpoints", config.engine.keep_checkpoints
        save_checkpoint(checkpoints, self._checkpoint(written), self.clients, keep)
        self.progress.scored(config.method, record, self.model.task.metric)

    def _visits(
        self, stage: Stage, cohort: list[str], round: int, failed: list[Failure]
    ) -> Iterator[Update]:
        """Visit the cohort S by S; a client that fails is noted and the round goes on."""
        expected = self._expected(stage)
        size = self._side_by_side(stage)
        for start in range(0, len(cohort), size):
            visits = [
                Visit(
                    self.federation.client(client_id),
                    self._kept(client_id, round - 1),
                    self.activation.client_blocks(client_id, self.config.seed),
                )
                for client_id in cohort[start : start + size]
            ]
            for each, result in zip(visits, self._visit(stage, visits, round), strict=True):
                try:
                    if isinstance(result, Exception):
                        raise result
                    check_update(result, expected)
                except Exception as error:  # what stops one client must not stop the federation
                    client_id = each.client.client_id
                    failed.append(Failure(client_id, f"{type(error).__name__}: {error}"))
                    self.progress.warn(f"round {round}: {client_id} dropped, {error}")
                else:
                    yield result
                self.progress.advance(1)

    def _visit(self, stage: Stage, visits: list[Visit], round: int) -> Sequence[Update | Exception]:
        """Visit clients side by side; each by itself where one of them stops all."""
        try:
            return visit(self.model, stage, visits, self.server, round, self.config.seed)
        except Exception as error:
            if len(visits) == 1:
                return [error]
            return [self._visit(stage, [each], round)[0] for each in visits]

    def _side_by_side(self, stage: Stage) -> int:
        wanted, batch = self.config.engine.cohort, stage.settings.batch_size
        return side_by_side(self.model, wanted, batch)

    def _cohort(self, stage: Stage, round: int) -> list[str]:
        config = self.config
        if not stage.phases:
            return []
        return draw_cohort(self.ids, config.server.fraction_train, config.seed, round)

    def _kept(self, client_id: str, round: int) -> State:
        """What a client holds of its own after a round; nothing before its first visit."""
        try:
            return self.clients.read(client_id, round) or {}
        except CheckpointError as error:  # one damaged file must not stop everybody
            self.progress.warn(f"{error}; the client begins anew")
            return {}

    def _score(self, stage: Stage, round: int) -> Scores:
        return evaluate(
            self.model,
            stage,
            self.server,
            lambda client_id: self._kept(client_id, round),
            self.federation,
            self.scored,
            self.pooled,
            self._side_by_side(stage),
            self.progress.advance,
        )

    @property
    def experts(self) -> list[str]:
        """Every expert that takes part in a stage."""
        return [*dict.fromkeys(name for stage in self.stages for name in stage.experts)]

    def received(self, stage: Stage) -> State:
        """What a client of a stage has from the server now."""
        return received(self.model, stage, self.server)

    def _awake(self, state: State, patterns: Patterns) -> State:
        return {
            name: tensor
            for name, tensor in select(state, patterns).items()
            if self.model.slots.is_awake(name)
        }

    def _expected(self, stage: Stage) -> State:
        """What an update of a stage may hold, by name and shape."""
        start = stage.start(self.received(stage), {})
        return self._awake(stage.leaves(start, start), stage.shares)

    def _bytes_down(self, stage: Stage, cohort: list[str], visited: set[str]) -> int:
        """What the cohort was sent: every round's part, and frozen ones to whoever lacked them."""
        every_time, once = (
            encoded_size(self._awake(self.received(stage), patterns))
            for patterns in (stage.sends_every_round, stage.frozen)
        )
        return every_time * len(cohort) + once * len(set(cohort) - visited)

    # State ----------------------------------------------------------------------------------------

    def _checkpoint(self, written: list[str]) -> Checkpoint:
        return Checkpoint(self.done, self.server, tuple(written), self.activation.state())

    @property
    def _sal(self) -> SalConfig:
        """SAL as this method has it: all awake from the start unless a stage wakes blocks."""
        return self.config.sal.replace(
            enabled=self.config.sal.enabled and any(stage.wakes for stage in self.stages),
        )

    @property
    def _first_stage_key(self) -> object:
        return self.stages[0], self._sal, self.config.seed, self.config.server, self.config.eval

    def _adopt(self) -> Checkpoint | None:
        """Begin where another method ended the same first stage, if one did."""
        outcome = self.world.outcomes.get(self._first_stage_key)
        if outcome is None:
            return None
        for name, text in outcome.lines.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        return outcome.checkpoint

    def _activation(self, found: Checkpoint | None) -> Activation:
        sal = self._sal
        if found is not None:
            activation = Activation(sal, found.sal["order"])
            activation.restore(found.sal)
            return activation
        return Activation(
            sal,
            wake_order(
                sal,
                len(self.model.backbone.blocks),
                self.config.seed,
                lambda: block_importance(self.model, self.federation),
            ),
        )

    def _wake(self) -> None:
        """Bring the model to the awake blocks."""
        self.model.slots.set_awake(self.activation.awake)
        self.model.prefix.keep([*self.activation.depths, self.model.slots.depth])

    def _enter(self, stage: Stage) -> None:
        """Bring the model to a stage: its small networks, and paths that nobody trains any more."""
        self.model.build(dict(stage.modules))
        frozen = [(expert,) for expert in stage.experts if matches(f"{expert}.", stage.frozen)]
        self.model.outputs.keep([(), *frozen])

    def _write(self, record: RoundRecord, scores: Scores | None) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        if scores is not None:
            with (self.folder / "clients.jsonl").open("a", encoding="utf-8") as file:
                for client in scores.clients:
                    file.write(
                        json.dumps({"round": record.round, "stage": record.stage, **asdict(client)})
                        + "\n"
                    )

    def _drop_metrics_after(self, round: int) -> None:
        """A kill can leave lines of a round that has no checkpoint, the last one torn."""
        for name in LINE_FILES:
            path = self.folder / name
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                whole = [line for line in lines if line.endswith("\n")]
                kept = [line for line in whole if json.loads(line)["round"] <= round]
                replace_file(path, "".join(kept).encode())


def encoded_size(state: State) -> int:
    """Bytes of a state as it would go over the wire (safetensors); none for an empty one."""
    return (
        len(save({name: tensor.detach().contiguous() for name, tensor in state.items()}))
        if state
        else 0
    )


def _mean_loss(updates: list[Update]) -> float | None:
    examples = sum(update.num_examples for update in updates)
    return (
        sum(update.train_loss * update.num_examples for update in updates) / examples
        if examples
        else None
    )
