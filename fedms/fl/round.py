"""The federated loop. A round is:

1. Draw the cohort from (seed, round), and make an order for each group that is sent the same.
2. The engine visits the cohort and adds up the updates that the server can take.
3. If enough clients came back, the stage's aggregate makes the server's next state of the sums.
4. SAL sees the common model's validation score, and may wake blocks for the next round.
5. Every ``eval.every`` rounds, a sample of the clients and the unseen ones are scored.
6. The lines are written, then the checkpoint, which makes the round count.

Where clients run is the engine's business, what they train the stage's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fedms.fl.algorithms import Stage, stages_of
from fedms.fl.channel.channel import Channel
from fedms.fl.config import Config
from fedms.fl.data.federation import EVERYONE
from fedms.fl.engines.engine import Engine, Order, Reply
from fedms.fl.evaluate import Scores, scored_sample, spread
from fedms.fl.journal.checkpoint import Checkpoint
from fedms.fl.journal.journal import Journal, last_counted
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.records import RoundRecord, peak_memory_mb
from fedms.fl.sal import PROBE_CLIENTS, Activation, SalConfig, wake_order
from fedms.fl.server import Server, require_quorum
from fedms.fl.types import Failure


class Run:
    """One method on one federation; goes on from the journal's newest checkpoint.

    Args:
        config: settings; ``config.method`` names the algorithm.
        clients: ids of those who take part.
        unseen: ids of those who are scored and take part in no round.
        server: of the model that the engine's clients have.
        engine: where clients run.
        journal: what was done, and where it is written.
        progress: who is told.

    Attributes:
        stages: of the algorithm.
        done: the last finished round, 0 before the first.
    """

    def __init__(
        self,
        config: Config,
        clients: Sequence[str],
        unseen: Sequence[str],
        server: Server,
        engine: Engine,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.config, self.server, self.engine = config, server, engine
        self.journal, self.progress = journal, progress
        self.clients = clients
        self.stages, self._channel = stages_of(config), Channel.of(config, len(clients))
        self._scored = scored_sample(clients, unseen, config.eval.clients, config.seed)
        self._visited: set[str] = set()
        """Who took part in the current stage."""
        self._counted: dict[str, int] = {}
        """The round in which a client's answer last counted."""
        self.done = 0
        sal = sal_of(config)
        found = journal.newest
        if found is not None:
            self.done, self.server.state = found.round, found.server
            self._counted = last_counted(journal.folder, self.done)
            self._activation = Activation(sal, found.sal["order"])
            self._activation.restore(found.sal)
        else:
            probes = clients[:PROBE_CLIENTS]
            order = wake_order(
                sal, server.num_blocks, config.seed, lambda: engine.importance(probes)
            )
            self._activation = Activation(sal, order)

    @property
    def awake(self) -> tuple[int, ...]:
        """The blocks whose experts take part now."""
        return self._activation.awake

    def run_stage(self, number: int) -> None:
        """Run what is left of one stage, all before it being done."""
        stage = self.stages[number]
        first = 1 + sum(before.settings.rounds for before in self.stages[:number])
        last = first + stage.settings.rounds - 1
        self._visited = {
            client
            for round in range(first, min(self.done, last) + 1)
            for client in self._cohort(stage, round)
        }
        for round in range(max(first, self.done + 1), last + 1):
            score = round == last or round % self.config.eval.every == 0
            self._round(number, round, self._scored if score else [])

    def _round(self, number: int, round: int, scored: Sequence[str]) -> None:
        started, stage = time.perf_counter(), self.stages[number]
        awake = self.awake

        cohort = self._cohort(stage, round)  # 1
        self._announce(stage, round, len(cohort) + len(scored))
        orders = self._orders(number, round, cohort)

        reply = Reply.merged([self.engine.train(order) for order in orders], cohort)  # 2

        require_quorum(len(cohort), reply.failed, self.config.server.quorum)  # 3
        self.server.state = reply.totals.finish(self.server.state)
        self._visited.update(cohort)
        self._counted |= dict.fromkeys((each.client_id for each in reply.visited), round)

        watched = Scores.merged([], [])
        if stage.wakes:  # 4
            orders = self._orders(number, round, self.clients)
            watched = Scores.merged([self.engine.validate(order) for order in orders], [])
            self._activation.observe(watched.common.mean)

        orders = self._orders(number, round, scored) if scored else []  # 5
        scores = Scores.merged([self.engine.evaluate(order) for order in orders], scored)
        unscored = Scores.merged([watched, scores], []).failed

        record = self._record(stage, awake, reply, scores, unscored, round, started)  # 6
        written = tuple(each.client_id for each in reply.visited if each.kept)
        checkpoint = Checkpoint(round, self.server.state, written, self._activation.state())
        self.journal.commit(record, scores.clients, checkpoint)
        self.done = round
        self.progress.scored(self.config.method, record, self.server.metric)

    def _cohort(self, stage: Stage, round: int) -> list[str]:
        if not stage.phases:
            return []
        if stage.pooled:
            return [EVERYONE]
        return self._channel.cohort(self.clients, round)

    def _orders(self, number: int, round: int, clients: Sequence[str]) -> list[Order]:
        """One for each group of clients that are sent the same; an empty one of no clients."""
        groups: dict[str, list[str]] = {}
        for client in clients:
            groups.setdefault(self.server.group(self.stages[number], client), []).append(client)
        return [self._order(number, round, *each) for each in (groups or {"": []}).items()]

    def _order(self, number: int, round: int, group: str, clients: Sequence[str]) -> Order:
        activation, seed = self._activation, self.config.seed
        sent, frozen = self.server.sends(self.stages[number], self.awake, group)
        return Order(
            method=self.config.method,
            stage=number,
            round=round,
            awake=self.awake,
            depths=tuple(activation.depths),
            clients={client: activation.client_blocks(client, seed) for client in clients},
            sent=sent,
            frozen=frozen,
            lacking=frozenset(clients) - self._visited,
            counted={
                client: self._counted[client] for client in clients if client in self._counted
            },
        )

    def _announce(self, stage: Stage, round: int, units: int) -> None:
        rounds = sum(each.settings.rounds for each in self.stages)
        self.progress.round(self.config.method, stage.name, round, rounds, units)

    def _record(
        self,
        stage: Stage,
        awake: Sequence[int],
        reply: Reply,
        scores: Scores,
        unscored: Sequence[Failure],
        round: int,
        started: float,
    ) -> RoundRecord:
        seen = [client for client in scores.clients if client.seen]
        unseen = [client for client in scores.clients if not client.seen]
        pooled = [c.pooled_accuracy for c in seen if c.pooled_accuracy is not None]
        gates = [client.gate_local for client in seen if client.gate_local is not None]
        trainable = self.server.trainable_parameters(stage.in_round(round), awake)
        return RoundRecord(
            round=round,
            stage=stage.name,
            seconds=time.perf_counter() - started,
            participants=[each.client_id for each in reply.visited],
            failed=list(reply.failed),
            awake_blocks=list(awake) if stage.experts else [],
            trainable_parameters=trainable,
            trainable_share=trainable / self.server.parameter_count,
            bytes_up=sum(each.bytes_up for each in reply.visited),
            bytes_down=reply.bytes_down,
            train_loss=reply.train_loss,
            global_accuracy=scores.common.mean,
            personalized_accuracy=spread([client.accuracy for client in seen]),
            pooled_accuracy=spread(pooled),
            unseen_accuracy=spread([client.accuracy for client in unseen]),
            gate_local_mean=sum(gates) / len(gates) if gates else None,
            peak_memory_mb=peak_memory_mb(),
            epsilon=self._channel.epsilon(round),
            unscored=list(unscored),
        )


def sal_of(config: Config) -> SalConfig:
    """SAL as a method has it: all blocks are awake from the start unless a stage wakes them."""
    wakes = any(stage.wakes for stage in stages_of(config))
    return config.sal.replace(enabled=config.sal.enabled and wakes)
