"""The searches on the embedded model: by hand, killed, resumed, and read by the methods that they are for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from vislm import load_lmm
from vislm.calibration import run
from vislm.calibration.captions import read_caption, word_probabilities, write_caption
from vislm.calibration.journal import open_journal
from vislm.calibration.row_heads import RowHeads, Silenced
from vislm.calibration.run import calibrate_heads, fingerprint, journal_path
from vislm.calibration.samples import load_samples
from vislm.calibration.scores import Scorer
from vislm.calibration.searches import Search
from vislm.calibration.settings import Settings
from vislm.calibration.sinks import find_dims, mean_activations
from vislm.cli import calibrate_heads as command
from vislm.data.scene_categories import CATEGORIES
from vislm.errors import RunFolderError, UnknownName, UsageError
from vislm.eval.captions.vocabulary import vocabulary_of
from vislm.heads.act import ACT
from vislm.heads.ad_hh import ADHH
from vislm.heads.var import VAR
from vislm.heads.zerotuning import ZeroTuning

WORDS = vocabulary_of(CATEGORIES)
SETTINGS = {
    "act": Settings("act", layers=(1, 2), score="likelihood", threshold=0.02, batch_size=3),
    "ad_hh": Settings("ad_hh", layers=(1, 3), top=3, batch_size=3),
    "zerotuning": Settings("zerotuning", layers=(2, 3), score="likelihood", gammas=(0.5, 2.0), batch_size=3),
}


@pytest.fixture(scope="module")
def lmm():
    return load_lmm("vislm-tiny")


@pytest.fixture(scope="module")
def questions():
    return load_samples("scenes", 2, 0, "", captions=False)


@pytest.fixture(scope="module")
def captions():
    return load_samples("scenes", 3, 0, "", captions=True)


class Killed(BaseException):
    """Stands for the signal that ends a process."""


# -- captions --------------------------------------------------------------------------------------------------------
def test_object_words_are_found_in_the_tokens(lmm, captions) -> None:
    for sample in captions:
        ids = write_caption(lmm, sample, 64)
        assert lmm.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == lmm.ask(
            sample.image, sample.question
        )
        caption = read_caption(lmm, sample, ids, WORDS)
        assert caption.places
        for place, hallucinated in zip(caption.places, caption.hallucinated, strict=True):
            word = lmm.processor.tokenizer.decode([ids[place]]).strip()
            name = next(name for name in CATEGORIES if word in (name, f"{name}s"))
            assert hallucinated == (name not in sample.objects)
    with pytest.raises(UsageError, match="no objects"):
        read_caption(lmm, replace(captions[0], objects=None), [5], WORDS)


def test_probabilities_are_those_of_every_single_prefix(lmm, captions) -> None:
    sample = captions[0]
    caption = read_caption(lmm, sample, write_caption(lmm, sample, 64), WORDS)
    rows = RowHeads(((1, 2), None))
    found = word_probabilities(lmm, caption, rows)
    assert found.shape == (2, len(caption.places))
    for row, pair in enumerate(rows.heads):
        inputs = lmm.prepare([sample.image], [sample.question])
        for word, place in enumerate(caption.places):
            ids = torch.cat([inputs["input_ids"], torch.tensor([caption.ids[:place]], dtype=torch.long)], 1)
            with lmm.using(Silenced(RowHeads((pair,)))), torch.no_grad():
                logits = lmm.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
            expected = logits.softmax(-1)[caption.ids[place]]
            torch.testing.assert_close(found[row, word], expected, atol=1e-5, rtol=1e-4)


# -- scores ----------------------------------------------------------------------------------------------------------
def test_scores_by_hand(lmm, questions) -> None:
    method = ZeroTuning(heads=((2, 1),), gamma=3.0)
    with lmm.using(method):
        replies = [
            lmm.ask_many([s.image], [s.question], max_new_tokens=1, candidates=("no", "yes"))[0].candidates
            for s in questions
        ]
    right = [max(reply, key=reply.__getitem__) == s.answer for reply, s in zip(replies, questions, strict=True)]
    assert Scorer(lmm, questions)(method, 2) == pytest.approx([sum(right) / 2] * 2)
    log = [
        torch.tensor([r["no"], r["yes"]]).log_softmax(-1)[["no", "yes"].index(s.answer)]
        for r, s in zip(replies, questions, strict=True)
    ]
    assert Scorer(lmm, questions, "likelihood")(method, 1) == pytest.approx([sum(log).item() / 2], abs=1e-5)
    entropy = Scorer(lmm, [replace(s, answer=None) for s in questions], "entropy")(method, 1)
    assert -torch.log(torch.tensor(85.0)) < entropy[0] <= 0.0


def test_samples_that_do_not_fit_a_score(lmm, questions) -> None:
    with pytest.raises(UsageError, match="no answer"):
        Scorer(lmm, [replace(questions[0], answer=None)])
    with pytest.raises(UsageError, match="same answer"):
        Scorer(lmm, questions[:1])


# -- searches --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", SETTINGS)
def test_a_killed_search_goes_on_as_if_nothing_had_happened(
    what, lmm, questions, captions, tmp_path, monkeypatch
) -> None:
    samples, settings = captions if what == "ad_hh" else questions, SETTINGS[what]
    whole = calibrate_heads(lmm, samples, settings, tmp_path / "a.json", WORDS)

    real = Search.missing

    def killed(self):
        for number, rows in enumerate(real(self)):
            if number == 1:
                raise Killed
            yield rows

    monkeypatch.setattr(Search, "missing", killed)
    with pytest.raises(Killed):
        calibrate_heads(lmm, samples, settings, tmp_path / "b.json", WORDS)
    assert not (tmp_path / "b.json").exists()
    noted = journal_path(tmp_path / "b.json").read_text()
    monkeypatch.setattr(Search, "missing", real)
    tried: list[int] = []
    monkeypatch.setattr(run, "_bar", lambda total, done, name, wanted: _counting(tried, done))
    resumed = calibrate_heads(lmm, samples, replace(settings, batch_size=5), tmp_path / "b.json", WORDS)
    assert tried == [3, 5]  # done before, done now
    assert resumed == whole
    assert journal_path(tmp_path / "b.json").read_text().startswith(noted)
    changed = replace(settings, max_new_tokens=9) if what == "ad_hh" else replace(settings, score="accuracy")
    with pytest.raises(RunFolderError, match="belongs to another search"):
        calibrate_heads(lmm, samples, changed, tmp_path / "b.json", WORDS)
    with pytest.raises(RunFolderError, match="number of samples"):
        calibrate_heads(lmm, samples[:-1], settings, tmp_path / "b.json", WORDS)


class _counting:
    def __init__(self, tried: list[int], done: int) -> None:
        self.tried = tried
        tried.append(done)

    def __enter__(self):
        return self.tried.append

    def __exit__(self, *error) -> None:
        pass


@pytest.mark.parametrize("what", SETTINGS)
def test_what_is_found_is_what_single_heads_give(what, lmm, questions, captions, tmp_path) -> None:
    samples, settings, out = captions if what == "ad_hh" else questions, SETTINGS[what], tmp_path / "found.json"
    entries = calibrate_heads(lmm, samples, settings, out, WORDS)
    content = json.loads(out.read_text())
    found = content["findings"]
    score = Scorer(lmm, questions, "likelihood")
    if what == "act":
        alone = score(ACT(((2, 3),), threshold=0.02), 1)
        assert found["2/3"] == pytest.approx(alone, abs=1e-5)
        assert entries == [p for p in entries if found[f"{p[0]}/{p[1]}"][0] > found["baseline"]]
        method = ACT(str(out), threshold=0.02)
    elif what == "zerotuning":
        alone = [score(ZeroTuning(heads=((3, 0),), gamma=gamma), 1)[0] for gamma in (1.5, 0.6)]
        assert found["3/0"] == pytest.approx(alone, abs=1e-5)
        assert len({gamma for *_, gamma in entries}) <= 1
        method = ZeroTuning(factors=str(out))
    else:
        assert len(entries) == 3
        gain = {pair: found[pair]["hallucinated"] - found[pair]["correct"] for pair in found}
        assert [f"{layer}/{head}" for layer, head in entries] == sorted(gain, key=gain.get, reverse=True)[:3]
        method = ADHH(str(out))
    with lmm.using(method):
        assert lmm.ask(questions[0].image, questions[0].question)


def test_factors_that_help_nowhere_give_an_empty_file(lmm, questions, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Scorer, "__call__", lambda self, method, copies: [0.5] * copies)
    for what in ("act", "zerotuning"):
        out = tmp_path / f"{what}.json"
        assert calibrate_heads(lmm, questions, SETTINGS[what], out, WORDS) == []
    with lmm.using(ACT(str(tmp_path / "act.json")), ZeroTuning(str(tmp_path / "zerotuning.json"))):
        assert lmm.ask(questions[0].image, questions[0].question)


def test_captions_without_hallucinations_say_nothing(lmm, captions, tmp_path) -> None:
    everything = [replace(sample, objects=frozenset(CATEGORIES)) for sample in captions]
    with pytest.raises(UsageError, match=r"0 of \d+ object words are hallucinated"):
        calibrate_heads(lmm, everything, SETTINGS["ad_hh"], tmp_path / "a.json", WORDS)


# -- sinks -----------------------------------------------------------------------------------------------------------
def test_a_planted_massive_activation_is_found(captions, tmp_path) -> None:
    lmm = load_lmm("vislm-tiny")
    start = lmm.prepare([None], ["describe the image ."])["input_ids"][0, 0]
    with torch.no_grad():
        lmm.model.model.language_model.embed_tokens.weight[start, 77] = 900.0
    settings = Settings("sinks", tau=8.0)
    assert calibrate_heads(lmm, captions[:2], settings, tmp_path / "sinks.json", WORDS) == [77]
    content = json.loads((tmp_path / "sinks.json").read_text())
    assert content["largest_means"]["77"] == pytest.approx(128**0.5, rel=0.01)
    with lmm.using(VAR(dims=str(tmp_path / "sinks.json"), tau=8.0)):
        lmm.ask(captions[0].image, captions[0].question, max_new_tokens=2)
    assert lmm.last_run.memory[0]["sinks"][2][0, 0]


def test_a_killed_search_for_sinks_goes_on(lmm, captions, tmp_path, monkeypatch) -> None:
    settings, whole = Settings("sinks", tau=0.5), mean_activations(lmm, captions)
    expected = calibrate_heads(lmm, captions, settings, tmp_path / "a.json", WORDS)
    asked: list[int] = []
    real = type(lmm).ask

    def ask(self, *args, **kwargs):
        asked.append(len(asked))
        if len(asked) == 2:
            raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(lmm), "ask", ask)
    with pytest.raises(Killed):
        calibrate_heads(lmm, captions, settings, tmp_path / "b.json", WORDS)
    assert not (tmp_path / "b.json").exists()
    asked.extend([9, 9])
    assert calibrate_heads(lmm, captions, settings, tmp_path / "b.json", WORDS) == expected
    assert len(asked) == 4 + len(captions) - 1  # the first sample was not asked again
    with open_journal(journal_path(tmp_path / "b.json"), fingerprint(lmm, captions, settings)) as journal:
        assert torch.equal(mean_activations(lmm, captions, journal), whole)
    with pytest.raises(RunFolderError, match="belongs to another search"):
        calibrate_heads(lmm, captions, replace(settings, tau=0.7), tmp_path / "b.json", WORDS)


@pytest.mark.parametrize("what", [*SETTINGS, "sinks"])
def test_an_artefact_of_another_model_is_refused(what, lmm, questions, captions, tmp_path) -> None:
    samples = captions if what in ("ad_hh", "sinks") else questions
    out = tmp_path / "found.json"
    calibrate_heads(lmm, samples, SETTINGS.get(what, Settings("sinks", tau=0.5)), out, WORDS)
    other = load_lmm("vislm-tiny")
    with torch.no_grad():
        other.model.model.language_model.embed_tokens.weight.neg_()
    methods = {"act": ACT(str(out)), "ad_hh": ADHH(str(out)), "zerotuning": ZeroTuning(factors=str(out))}
    method = methods.get(what, VAR(dims=str(out), tau=5.0))
    with pytest.raises(UsageError, match="fingerprint"), other.using(method):
        pass
    with lmm.using(method):
        pass


def test_the_means_are_those_of_hidden_states(lmm, captions) -> None:
    states = []
    for sample in captions:
        with torch.no_grad():
            out = lmm.model(**lmm.prepare([sample.image], [sample.question]), output_hidden_states=True)
        states += [h[0, 0] for h in out.hidden_states[2:4]]  # what enters layers 2 and 3
    x = torch.stack(states)
    expected = (x.abs() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).mean(0)
    torch.testing.assert_close(mean_activations(lmm, captions), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match=r"largest are 3: 5, 0: 2, 1: 1, 2: 0; give a lower --tau"):
        find_dims(torch.tensor([2.0, 1.0, 0.0, 5.0]), 6.0)


# -- settings and the command ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"what": "sink"}, "did you mean 'sinks'"),
        ({"score": "accurracy"}, "did you mean 'accuracy'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"beta": 2.0}, "beta=2.0"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"up": 0.9}, "up=0.9"),
        ({"gammas": (0.5,)}, "both sides"),
        ({"gammas": (0.0, 2.0)}, "factors > 0"),
        ({"layers": (4,)}, "layers 0..3"),
    ],
)
def test_impossible_settings(lmm, questions, changes, message, tmp_path) -> None:
    with pytest.raises((UsageError, UnknownName), match=message):
        calibrate_heads(lmm, questions, replace(Settings("act"), **changes), tmp_path / "a.json", WORDS)


def test_default_layers() -> None:
    assert Settings("act").chosen_layers(32) == list(range(2, 31))
    assert Settings("zerotuning").chosen_layers(4) == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_command(tmp_path) -> None:
    app = typer.Typer()
    app.command()(command.calibrate_heads)
    arguments = ["--num-samples", "2", "--layers", "2", "--score", "likelihood", "--out", str(tmp_path / "act.json")]
    result = CliRunner().invoke(app, ["--what", "act", *arguments])
    assert result.exit_code == 0, result.output
    assert f"use: --heads act:heads={tmp_path / 'act.json'}" in result.stdout
    again = CliRunner().invoke(app, ["--what", "act", *arguments])
    assert again.stdout == result.stdout
