"""The configuration: what is written comes back, and every mistake is named."""

from __future__ import annotations

import re
import tomllib

import pytest
from pydantic import ValidationError

from fedms.fl.config import Config, explain, load_config, to_toml
from fedms.fl.settings import Section
from fedms.fl.types import ConfigError


def test_no_file_and_no_overrides_give_the_defaults():
    assert load_config() == Config()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "method=fedavg",
            'rivals=["local_only"]',
            "seed=7",
            "data.alpha=0.1",
            "data.partitioner=column",
            "data.client_column=ward",
            'data.source=über "quoted".csv',
            "model.prompt=a note about {}",
            'lora.targets=["query", "intermediate.dense"]',
            "stage1.lr=1e-05",
            "stage2.rounds=0",
            "sal.enabled=false",
            "mofm.combine=layer",
            "mofm.gate_input=base",
            "eval.pooled_examples=0",
        ],
    ],
)
def test_a_saved_configuration_comes_back_equal(tmp_path, overrides):
    config = load_config(None, overrides)
    for text in (to_toml(config), explain(config)):
        (tmp_path / "config.toml").write_text(text, encoding="utf-8")
        assert load_config(tmp_path / "config.toml") == config
        written = tomllib.loads(text)
        assert written["seed"] == config.seed
        assert written["stage1"]["lr"] == config.stage1.lr


def _sections(section: Section) -> list[Section]:
    inner = [value for _, value in section if isinstance(value, Section)]
    return [section, *(found for value in inner for found in _sections(value))]


def test_every_setting_has_a_meaning():
    for section in _sections(Config()):
        for name, setting in type(section).model_fields.items():
            inner = isinstance(getattr(section, name), Section)
            assert inner or (setting.description or "").endswith("."), f"{type(section)}.{name}"


def test_a_setting_is_explained_above_it():
    """Meaning, limits or choices, default; within 100 columns."""
    text = explain(Config())
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        'for partitioner = "column".\n# client_column = (none)\n',
        "# Share of a cohort that must come back for the round to count. (in (0, 1])\nquorum = 0.5",
        '(iid | dirichlet |\n# pathological | column)\npartitioner = "dirichlet"',
    ):
        assert part in text


def test_settings_are_immutable_and_replaced_with_a_check():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.stage1.rounds = 3  # type: ignore[misc]
    changed = config.replace(seed=3)
    assert (changed.seed, changed.data, config.seed) == (3, config.data, 0)
    for change in ({"sed": 3}, {"seed": -1}):
        with pytest.raises(ValidationError):
            config.replace(**change)


def test_an_override_beats_the_file_and_the_last_one_beats_the_others(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(
        "seed = 3\n[stage1]\nrounds = 5\nlr = 1\n[data]\nalpha = 0.7\n", encoding="utf-8"
    )
    config = load_config(path, ["stage1.rounds=2", "data.alpha=0.2", "data.alpha=0.9"])
    assert (config.seed, config.stage1.rounds, config.stage1.lr, config.data.alpha) == (
        3,
        2,
        1.0,
        0.9,
    )
    assert config.stage1.local_steps == Config().stage1.local_steps
    assert config.stage2 == Config().stage2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain words", "plain words"),
        ('"3"', "3"),
        ("a=b", "a=b"),
        ("", ""),
        ("C:\\data.csv", "C:\\data.csv"),
    ],
)
def test_what_is_no_toml_value_is_a_string(text, value):
    assert load_config(None, [f"data.source={text}"]).data.source == value


def test_an_integer_serves_as_a_float_and_is_stored_as_one():
    alpha = load_config(None, ["data.alpha=1"]).data.alpha
    assert alpha == 1.0
    assert isinstance(alpha, float)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("data.alpah=1", "data.alpha"),
        ("stage1.round=3", "stage1.rounds"),
        ("num_clients=4", "data.num_clients"),
        ("rounds=4", "stage1.rounds"),
        ("mofm.gate_step=4", "mofm.gate_steps"),
        ("metod=fedavg", "method"),
        ("sal.local_steps=3", "stage1.local_steps"),
    ],
)
def test_an_unknown_setting_names_the_nearest_right_one(override, meant):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert str(caught.value) == f"unknown setting {key}; did you mean {meant}?"


def test_names_for_labels(tmp_path):
    config = load_config(None, ["data.class_names.J18=pneumonia", "data.class_names.K35=other"])
    assert config.data.class_names == {"J18": "pneumonia", "K35": "other"}
    for text in (to_toml(config), explain(config)):
        (tmp_path / "config.toml").write_text(text)
        assert load_config(tmp_path / "config.toml") == config
    quoted = load_config(None, ['data.class_names."J18.9"=pneumonia', "data.class_names.'K.3'=x"])
    assert quoted.data.class_names == {"J18.9": "pneumonia", "K.3": "x"}
    with pytest.raises(ConfigError, match=r"data.class_names.J18 must be of type str, got 1"):
        load_config(None, ["data.class_names.J18=1"])


def test_an_unknown_setting_near_to_none_lists_the_sections():
    with pytest.raises(
        ConfigError, match=r"unknown setting qqqq; the sections are .*data, task, model, lora"
    ):
        load_config(None, ["qqqq=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=x", r"seed must be of type int, got 'x' \(str\)"),
        ("seed=1.5", r"seed must be of type int, got 1.5 \(float\)"),
        ("seed=true", r"seed must be of type int, got True \(bool\)"),
        ("data.alpha=true", r"data.alpha must be of type float, got True"),
        ("data.alpha=big", r"data.alpha must be of type float, got 'big'"),
        ("sal.enabled=1", r"sal.enabled must be of type bool, got 1"),
        ("data.text_column=3", r"data.text_column must be of type str, got 3"),
        ("data.client_column=3", r"data.client_column must be of type str, got 3"),
        ("lora.targets=query", r"lora.targets must be a list, got 'query'"),
        ("lora.targets=[1]", r"lora.targets\[0\] must be of type str, got 1"),
        ("method=fedfoo", r"method must be one of fedms, fedavg, .*; got 'fedfoo'"),
        ('rivals=["fedfoo"]', r"rivals\[0\] must be one of fedms, fedavg, .*; got 'fedfoo'"),
        ("mofm.combine=sum", r"mofm.combine must be one of probabilities, .*; got 'sum'"),
        ("data=3", r"data is a section with settings of its own, got 3"),
        ("seed.x=3", r"seed must be of type int"),
        ("seed", r"must look like key=value, e.g. stage1.rounds=4; got 'seed'"),
        ("=3", r"must look like key=value"),
    ],
)
def test_wrong_types_and_choices(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_every_mistake_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["seed=x", "data.alpah=1", "sal.max_blocks=0", "model.prompt=a note"])
    assert str(caught.value).splitlines() == [
        "seed must be of type int, got 'x' (str)",
        "unknown setting data.alpah; did you mean data.alpha?",
        "model.prompt must contain {}, where the class name goes; got 'a note'",
        "sal.max_blocks must be at least 1, got 0",
    ]


def test_a_value_is_not_a_section():
    with pytest.raises(ConfigError, match=r"seed\.x: seed is a value, not a section"):
        load_config(None, ["seed=1", "seed.x=3"])


@pytest.mark.parametrize(
    ("key", "least"),
    [
        ("stage1.rounds", 0),
        ("stage2.rounds", 0),
        ("stage1.local_steps", 1),
        ("stage2.batch_size", 1),
        ("lora.r", 1),
        ("sal.start_blocks", 1),
        ("sal.wake_blocks", 1),
        ("sal.every", 1),
        ("sal.min_budget", 1),
        ("mofm.gate_steps", 0),
        ("eval.pooled_examples", 0),
        ("engine.prefix_cache_mb", 0),
        ("eval.every", 1),
        ("eval.batch_size", 1),
        ("engine.keep_checkpoints", 2),
        ("model.max_tokens", 3),
    ],
)
def test_the_least_value_is_legal_and_the_one_below_is_not(key, least):
    load_config(None, [f"{key}={least}"])
    with pytest.raises(ConfigError, match=f"{key} must be at least {least}, got {least - 1}"):
        load_config(None, [f"{key}={least - 1}"])


def test_fewer_blocks_at_most_than_at_the_start():
    with pytest.raises(ConfigError, match=r"sal\.max_blocks must be at least 3, got 2"):
        load_config(None, ["sal.start_blocks=3", "sal.max_blocks=2"])


@pytest.mark.parametrize("key", ["server.fraction_train", "server.quorum"])
def test_shares_are_in_zero_to_one(key):
    assert load_config(None, [f"{key}=1"]).server
    for value in ("0", "-0.1", "1.01", "nan"):
        with pytest.raises(ConfigError, match=rf"{key} must be in \(0, 1\]"):
            load_config(None, [f"{key}={value}"])


@pytest.mark.parametrize(
    "key", ["stage1.lr", "stage2.lr", "mofm.gate_lr", "lora.alpha", "model.logit_scale"]
)
def test_what_must_be_above_zero(key):
    for value in ("0", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match=rf"{key} must be a finite number above 0"):
            load_config(None, [f"{key}={value}"])


@pytest.mark.parametrize("key", ["mofm.balance", "mofm.anchor", "stage2.weight_decay"])
def test_what_may_be_zero_but_not_below(key):
    load_config(None, [f"{key}=0"])
    for value in ("-0.1", "nan", "inf"):
        with pytest.raises(ConfigError, match=rf"{key} must be at least 0\.0, got"):
            load_config(None, [f"{key}={value}"])


@pytest.mark.parametrize(
    ("key", "least", "most"),
    [
        ("engine.threads", 0, 1024),
        ("mofm.bottleneck", 1, 4096),
        ("model.image_size", 0, 4096),
        ("sal.queue_length", 2, 10**6),
        ("feddpa_f.examples", 1, 1024),
        ("feddpa_t.examples", 1, 1024),
    ],
)
def test_no_more_than_any_machine_runs(key, least, most):
    for legal in (least, most):
        load_config(None, [f"{key}={legal}"])
    for value in (least - 1, most + 1):
        limits = re.escape(f"{key} must be in [{least}, {most:g}], got {value}")
        with pytest.raises(ConfigError, match=limits):
            load_config(None, [f"{key}={value}"])


def test_the_threshold_is_a_number():
    with pytest.raises(ConfigError, match=r"sal.threshold must be a finite number, got nan"):
        load_config(None, ["sal.threshold=nan"])


def test_dropout_leaves_something():
    load_config(None, ["lora.dropout=0.99"])
    for value in ("1", "-0.1", "nan"):
        with pytest.raises(ConfigError, match=r"lora\.dropout must be in \[0, 1\), got"):
            load_config(None, [f"lora.dropout={value}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("task.kind=causal_lm task.head=linear", 'task.head = "linear" is for classes'),
        ("data.client_column=ward", r"data.client_column = \"ward\" .* data.partitioner=column"),
        ("sal.scope=client sal.min_budget=4", "sal.min_budget must be at most .* = 3, got 4"),
        ("method=centralised sal.scope=client", "centralised needs every block of every client"),
        ("mofm.eigengap=true", "mofm.clusters must be at least 3, got 0"),
        ("mofm.eigengap=true mofm.clusters=2", "mofm.clusters must be at least 3, got 2"),
        ("data.gate=0 data.train=0.72", "fedms trains its gate .* mofm.gate_data=train"),
        ("data.val=0 data.train=0.74", '"capability_queue" watches scores on .* data.val'),
        (
            "channel.privacy.epsilon=2",
            "channel.privacy.epsilon = 2 promises nothing .* channel.privacy.clip",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        "data.client_column=ward data.partitioner=column",
        "sal.scope=client sal.min_budget=3",
        "mofm.eigengap=true mofm.clusters=3",
        "data.gate=0 data.train=0.72 mofm.gate_data=train",
        "data.gate=0 data.train=0.72 mofm.gate=fixed",
        "data.gate=0 data.train=0.72 mofm.combine=layer mofm.gate_input=base",
        "data.gate=0 data.train=0.72 stage2.rounds=0",
        "data.gate=0 data.train=0.72 method=fedavg",
        "data.val=0 data.train=0.74 sal.trigger=every",
        "data.val=0 data.train=0.74 sal.max_blocks=1",
        "channel.privacy.epsilon=2 channel.privacy.clip=1",
    ],
)
def test_the_same_settings_where_they_do_something(overrides):
    load_config(None, overrides.split())


def test_a_rival_has_the_examples_that_it_asks_for():
    asked = ["method=fedavg", 'rivals=["fedms"]', "data.gate=0", "data.train=0.72"]
    with pytest.raises(ConfigError, match="fedms trains its gate on the examples"):
        load_config(None, asked)


def test_no_targets_and_no_rounds():
    with pytest.raises(ConfigError, match=r"lora\.targets must name at least one linear"):
        load_config(None, ["lora.targets=[]"])
    with pytest.raises(ConfigError, match=r"stage1\.rounds and stage2\.rounds must not both be 0"):
        load_config(None, ["stage1.rounds=0", "stage2.rounds=0"])


def test_the_prompt_has_a_place_for_the_class():
    with pytest.raises(ConfigError, match=r"model.prompt must contain {}"):
        load_config(None, ["model.prompt=a note"])


@pytest.mark.parametrize("gate_input", ["experts", "both"])
def test_mixing_in_the_layers_leaves_nothing_for_the_gate_to_read_of_the_experts(gate_input):
    with pytest.raises(ConfigError, match=f'mofm.gate_input must be "base", got "{gate_input}"'):
        load_config(None, ["mofm.combine=layer", f"mofm.gate_input={gate_input}"])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    path.write_text("seed = = 3", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad.toml is not valid TOML"):
        load_config(path)
    path.write_bytes(b'method = "\xff"')
    with pytest.raises(ConfigError, match=r"bad.toml is not valid TOML"):
        load_config(path)
