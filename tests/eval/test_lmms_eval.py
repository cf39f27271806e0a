"""The plug-in for lmms-eval: with the installed package, or else with stand-ins for the two names that it imports."""

from __future__ import annotations

import abc
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vislm.errors import UnknownName, UsageError
from vislm.eval.plugins.model_args import ModelArgs
from vislm.eval.plugins.requests import Generation, Request, in_batches, question
from vislm.lmm.model import load_lmm

PICTURES = [Image.linear_gradient("L").convert("RGB").rotate(90 * n) for n in range(3)]


class CacheHook:
    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def add_partial(self, *arguments) -> None:
        self.seen.append(arguments)


class Base(abc.ABC):
    """What lmms-eval's documentation says of ``lmms_eval.api.model.lmms``."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook, self.task_dict = CacheHook(), {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, text, additional=None):
        pairs = dict(pair.split("=", 1) for pair in text.split(",") if pair)
        return cls(**pairs, **{k: v for k, v in (additional or {}).items() if v is not None})

    def clean(self) -> None:
        self.task_dict = {}


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture
def harness(monkeypatch):
    """lmms-eval if it is there, else stand-ins."""
    if importlib.util.find_spec("lmms_eval") is None:
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        registry = ModuleType("lmms_eval.models.registry_v2")
        registry.ModelManifest = Manifest  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, registry.__name__, registry)
        sys.modules["lmms_eval.api.model"].lmms = Base  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.delitem(sys.modules, "vislm.eval.plugins.lmms_eval_model", raising=False)
    yield
    sys.modules.pop("vislm.eval.plugins.lmms_eval_model", None)


@pytest.fixture
def build(harness):
    """Make a model from model_args, as lmms-eval does; three documents are its task."""
    from vislm.eval.plugins.lmms_eval import manifest

    module, _, name = manifest().simple_class_path.rpartition(".")
    made = []

    def make(text: str = "", **additional: Any):
        model = getattr(importlib.import_module(module), name).create_from_arg_string(text, additional)
        model.task_dict = {"task": {"test": list(range(len(PICTURES)))}}
        model.cache_hook = CacheHook()
        made.append(model)
        return model

    yield make
    for model in made:
        model.clean()


def asks(texts, options=None, visual=lambda doc: [PICTURES[doc]]):
    return [
        Request((text, options or {"max_new_tokens": 6}, visual, n % 3, "task", "test")) for n, text in enumerate(texts)
    ]


QUESTIONS = ["Describe the image.", "Is there a dog in the image?", "Is there a ball?", "What is shown?"]


def test_manifest_names_a_simple_model_of_the_right_kind(build) -> None:
    from vislm.eval.plugins.lmms_eval import MODEL_ID, manifest

    stated = manifest()
    assert (stated.model_id, stated.chat_class_path) == (MODEL_ID, None)
    assert build().is_simple is True


def test_answers_are_those_of_the_model_in_the_order_of_the_requests(build) -> None:
    model = build("prune=flowcut:keep=8", batch_size=3)
    found = model.generate_until(asks(QUESTIONS))
    with load_lmm("vislm-tiny").using(*ModelArgs.read({"prune": "flowcut:keep=8"}).interventions()) as lmm:
        expected = [lmm.ask(PICTURES[n % 3], text, max_new_tokens=6) for n, text in enumerate(QUESTIONS)]
    assert found == expected
    assert [seen[2] for seen in model.cache_hook.seen] == expected


def test_methods_are_in_force_until_the_model_is_cleaned(build) -> None:
    model = build("prune=flowcut:keep=8;,heads=vhr")
    lmm = model.lmm
    assert len(lmm.fingerprint()["interventions"]) == 2
    assert "keep=8" in lmm.fingerprint()["interventions"][0]
    model.clean()
    assert lmm.fingerprint()["interventions"] == []


def test_other_methods_are_other_model_args() -> None:
    given = [{"prune": "flowcut:keep=8"}, {"prune": "flowcut:keep=9"}, {"prune": "flowcut:keep=8", "heads": "vhr"}, {}]
    built = [repr(ModelArgs.read(arguments).interventions()) for arguments in given]
    assert len(set(built)) == len(built)


def test_model_args_are_read_as_the_harness_gives_them() -> None:
    given = {"pretrained": 7, "prune": '"flowcut:keep=8,layer=1; random:keep=4"', "heads": "", "device": None}
    read = ModelArgs.read({**given, "batch_size": "4", "max_batch_size": 64})
    assert read == ModelArgs("7", ("flowcut:keep=8,layer=1", "random:keep=4"), batch_size=4)


@pytest.mark.parametrize(
    ("given", "error", "part"),
    [
        ({"prun": "flowcut"}, UnknownName, "prune"),
        ({"prune": "flowcut.yaml"}, UsageError, "cache would not notice"),
        ({"batch_size": "auto"}, UsageError, "batch_size=auto"),
        ({"batch_size": 0}, UsageError, "batch_size=0"),
        ({"prune": "flowcat"}, UnknownName, "flowcut"),
        ({"heads": "vhr:alpa=2"}, UnknownName, "alpha"),
    ],
)
def test_wrong_model_args(given, error, part) -> None:
    with pytest.raises(error, match=part):
        ModelArgs.read(given).interventions()


def test_stop_strings_cut_and_lists_stay_as_they_are(build) -> None:
    model = build()
    (whole,) = model.generate_until(asks(QUESTIONS[:1], {"max_new_tokens": 12, "until": []}))
    options = {"max_new_tokens": 12, "until": [whole.split()[2]], "temperature": 0, "image_aspect_ratio": "pad"}
    kept = {**options}
    (cut,) = model.generate_until(asks(QUESTIONS[:1], options))
    assert cut == " ".join(whole.split()[:2])
    assert options == kept


def test_questions_without_pictures_and_with_several(build) -> None:
    model = build()
    assert model.generate_until(asks(["Is there a dog?"], visual=lambda _: None)) != [""]
    assert len(model.generate_until(asks(["<image> <image> What is shown?"], visual=lambda _: PICTURES[:2]))) == 1


def test_broken_pictures_are_counted_not_replaced(build, caplog) -> None:
    bad = Image.new("RGB", (40_000, 1))
    model = build(batch_size=3)
    found = model.generate_until(asks(QUESTIONS[:3], visual=lambda doc: [bad if doc == 1 else PICTURES[doc]]))
    assert found[1] == ""
    assert found[0]
    assert found[2]
    assert "1 requests answered by nothing" in caplog.text


def test_losses_are_small_for_what_the_model_says(build) -> None:
    model = build("prune=flowcut:keep=16")
    said = model.generate_until(asks(QUESTIONS[1:2], {"max_new_tokens": 8}))[0]
    other = "no" if said.startswith("yes") else "yes"
    arguments = [
        (QUESTIONS[1], target, lambda doc: [PICTURES[doc]], 0, "task", "test") for target in (said, f" {other}")
    ]
    arguments.append((QUESTIONS[1], lambda doc: said if doc == 0 else "", *arguments[0][2:]))
    (own, is_greedy), (far, is_far_greedy), by_function = model.loglikelihood([Request(a) for a in arguments])
    assert 0.0 <= own < far
    assert (is_greedy, is_far_greedy) == (True, False)
    assert by_function == (own, True)
    assert model.loglikelihood([Request(("Is there a dog?", "yes"))])[0][0] > 0.0
    with pytest.raises(UsageError, match="no words"):
        model.loglikelihood([Request((QUESTIONS[1], " ", *arguments[0][2:]))])


def test_rounds_go_on_until_the_task_says_so(build) -> None:
    told = []

    def next_round(doc, previous_output, round_idx, previous_round_info):
        told.append((doc, list(previous_output), round_idx, previous_round_info))
        return [PICTURES[doc]], f"You said {previous_output[-1]}. Describe.", round_idx == 3, previous_output, round_idx

    model = build()
    request = Request((QUESTIONS[1], {"max_new_tokens": 4}, lambda doc: [PICTURES[doc]], next_round, 2, "task", "test"))
    (answers,) = model.generate_until_multi_round([request])
    assert len(answers) == 3
    assert [(doc, len(said), number, info) for doc, said, number, info in told] == [
        (2, 1, 1, None),
        (2, 2, 2, 1),
        (2, 3, 3, 2),
    ]
    assert answers[0] == model.generate_until(asks(QUESTIONS[1:2], {"max_new_tokens": 4}, lambda _: [PICTURES[2]]))[0]


def test_generation_settings() -> None:
    assert Generation.read({}) == Generation(1024, (), {})
    assert Generation.read({"temperature": 0.0, "do_sample": True, "top_p": None, "until": "\n\n"}).options == {}
    warm = Generation.read({"temperature": 0.7, "top_p": 0.9, "num_beams": 2, "max_new_tokens": 5})
    assert warm.options == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_beams": 2}
    assert Generation.read({"temperature": 0.7, "do_sample": False}).options == {}
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": "9"}, {"until": 3}, {"until": [1]}):
        with pytest.raises(UsageError):
            Generation.read(wrong)


def test_videos_are_refused() -> None:
    with pytest.raises(UsageError, match="str objects"):
        question("What happens?", ["clip.mp4"])


@given(st.lists(st.tuples(st.sampled_from("ab"), st.text(max_size=4)), max_size=12), st.integers(1, 5))
def test_batches_hold_every_request_once_and_one_kind_each(requests, size) -> None:
    keys, texts = [k for k, _ in requests], [t for _, t in requests]
    batches = in_batches(keys, texts, size)
    assert sorted(n for batch in batches for n in batch) == list(range(len(requests)))
    assert all(len({keys[n] for n in batch}) == 1 and len(batch) <= size for batch in batches)


def test_nothing_of_the_harness_is_imported_by_the_rest() -> None:
    code = "import sys, vislm.eval.plugins.lmms_eval, vislm.eval.plugins.model_args, vislm.eval.running.runner; "
    code += "print([m for m in sys.modules if m.partition('.')[0] in ('lmms_eval', 'torch', 'transformers')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
