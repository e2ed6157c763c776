"""Jobs whose rows are tagged words, pairs of texts, or preferences, on tiny models: from train to merge."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cli import tinylm
from cli.tinyjob import BAD, GOOD, OTHER, Tiny

import jpeft
from jpeft.cli import build, config, runs, tables
from jpeft.cli.main import main

LABELS = "[O, B-GOOD, I-GOOD, B-BAD]"
SPLIT = f"labels: {LABELS}, test: 12, validation: 12, max_length: 12, buckets: [12]"
TAGS = "{{format: rows, source: {home}/tags.jsonl, " + SPLIT + "}}"
CONLL = "{{format: conll, source: {home}/tags.conll, " + SPLIT + "}}"
PAIRS = ("{{source: {home}/pairs.csv, anchor: 'the {{text}}', positive: '{{other}}', negative: '{{wrong}}', score: "
         "alike, min_score: 0.5, test: 16, validation: 16, max_length: 8, buckets: [8]}}")
PREFERENCES = ("{{format: preference, source: {home}/answers.csv, prompt: 'the {{text}}', chosen: '{{good}}', "
               "rejected: '{{bad}}', chat: true, test: 10, validation: 8, max_length: 32}}")
HEAD, WORDS = "  classifier/.*: {method: Full}\n", "  embeddings/word/embedding: {method: Full}\n"
JOBS = {"tags": ("token-classification", TAGS, HEAD + WORDS), "conll": ("token-classification", CONLL, HEAD),
        "pairs": ("embedding", PAIRS, WORDS), "answers": ("causal-lm", PREFERENCES, "")}
STEPS = {"tags": 80, "conll": 1, "pairs": 60, "answers": 12}


def sentence(draw: random.Random) -> tuple[list[str], list[str]]:
    """Return words with tags: a good word opens an entity that `film` continues, a bad one is an entity of one word."""
    words, tags = [], []
    for _ in range(draw.randint(1, 3)):
        kind = draw.randint(0, 2)
        words += [draw.choice((OTHER, GOOD, BAD)[kind])]
        tags += [("O", "B-GOOD", "B-BAD")[kind]]
        if kind == 1 and draw.random() < 0.5:
            words, tags = [*words, "film"], [*tags, "I-GOOD"]
    return words, tags


@pytest.fixture(scope="module")
def home(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every kind, and a configuration for each."""
    folder, draw = tmp_path_factory.mktemp("objectives"), random.Random(0)
    lm = tinylm.make(folder)
    sentences = [sentence(draw) for _ in range(96)]
    (folder / "tags.jsonl").write_text("\n".join(json.dumps({"tokens": w, "tags": t}) for w, t in sentences))
    (folder / "tags.conll").write_text("\n\n".join(
        "\n".join(f"{w} X {t}" for w, t in zip(*one, strict=True)) for one in sentences) + "\n")
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file)
        write.writerow(["text", "other", "wrong", "alike"])
        for i in range(96):
            one, two = draw.sample(GOOD if i % 2 else BAD, 2)
            extra, wrong = (" ".join(draw.sample(OTHER, 2)) for _ in range(2))
            write.writerow([f"{one} {extra}", f"{two} {extra}", f"{draw.choice(BAD if i % 2 else GOOD)} {wrong}",
                            [0.9, 0.7, 0.1][i % 3]])
    with open(folder / "answers.csv", "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file)
        write.writerow(["text", "good", "bad"])
        for _ in range(60):
            write.writerow([" ".join(draw.sample([*GOOD, *BAD, *OTHER], 3)), *tinylm.ANSWERS])
    for name, (task, data, head) in JOBS.items():
        model = lm.model if task == "causal-lm" else tiny.model
        (folder / f"{name}.yaml").write_text("\n".join([
            f"model: {{source: {model}, task: {task}}}", f"data: {data.format(home=folder)}",
            f"rules:\n{head}  all-linear: {{method: LoRA, rank: 2, alpha: 4}}",
            f"train: {{steps: {STEPS[name]}, batch_size: 8, learning_rate: 2e-2, warmup: 0, eval_every: 40}}",
            *([tinylm.GENERATE] if name == "answers" else []), f"output: {folder / 'runs'}"]))
    return folder


def trained(home: Path, name: str) -> Path:
    if not (home / "runs" / name).exists():
        assert main(["train", str(home / f"{name}.yaml")]) == 0
    return home / "runs" / name


def summary_of(folder: Path) -> runs.RunSummary:
    found = runs.summary(folder)
    assert found is not None
    return found


@pytest.mark.slow
def test_tags_are_learnt_evaluated_and_predicted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(home, "tags")
    found = summary_of(run)
    assert found.task == "token-classification"
    assert found.test["f1"] > 0.9
    assert set(found.test) == {"loss", "accuracy", "count", "f1", "precision", "recall", "entities"}
    assert found.best["f1"] == max(row["eval/f1"] for row in map(json.loads, (run / runs.METRICS).open())
                                   if "eval/f1" in row)
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert f"test: F1 {found.test['f1']:.4f}" in capsys.readouterr().out
    assert main(["predict", str(run), "--text", "the good film is bad", "--text", "film " * 12]) == 0
    out, err = capsys.readouterr()
    said = out.splitlines()[0].split(" ")
    assert [said[0], said[1], said[4]] == ["the/O", "good/B-GOOD", "bad/B-BAD"]
    assert [word.split("/")[0] for word in said] == ["the", "good", "film", "is", "bad"]
    assert out.splitlines()[1].count("film/?") == 2
    assert "2 words have no tag" in err


def test_tags_in_columns_of_text_are_the_same_rows(home: Path) -> None:
    jobs = [config.load(home / f"{name}.yaml") for name in ("tags", "conll")]
    loaded = build.load_model(jobs[0])
    rows, lines = (build.load_data(job, loaded.tokenizer) for job in jobs)
    for name in build.SPLITS:
        for a, b in ((rows[name].ids, lines[name].ids), (rows[name].labels, lines[name].labels)):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_merged_tags(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(trained(home, "tags")), str(tmp_path / "merged")]) == 0
    model, params, tokenizer = jpeft.from_pretrained(tmp_path / "merged")
    assert model.config.task == "token-classification"
    assert '"B-GOOD"' in (tmp_path / "merged" / "config.json").read_text()
    said = np.asarray(model.apply(params, **tokenizer(["the good film"])).logits.argmax(-1))[0, 1:4]
    names = ["O", "B-GOOD", "I-GOOD", "B-BAD"]
    capsys.readouterr()
    assert main(["predict", str(trained(home, "tags")), "--text", "the good film"]) == 0
    assert capsys.readouterr().out.split() == [f"{w}/{names[n]}" for w, n in zip(("the", "good", "film"), said,
                                                                                strict=True)]


@pytest.mark.slow
def test_embeddings_are_learnt_evaluated_and_compared(home: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(home, "pairs")
    said = capsys.readouterr().out
    found = summary_of(run)
    assert "training rows have a score below data.min_score = 0.5" in said
    assert found.task == "embedding"
    assert set(found.test) == set(found.before) == {"loss", "recall_at_1", "mrr", "count", "spearman"}
    assert found.test["mrr"] > found.before["mrr"]
    assert found.test["count"] < 16
    assert main(["eval", str(run)]) == 0
    assert f"recall@1 {found.test['recall_at_1']:.4f}" in capsys.readouterr().out
    assert main(["predict", str(run), "--text", "good film\tfine film", "--text", "good\tgood"]) == 0
    near = [float(line.split("\t")[0]) for line in capsys.readouterr().out.splitlines()]
    assert near[1] == 1.0
    assert near[0] < 1.0
    assert main(["predict", str(run), "--text", "good film", "--text", "fine film", "--text", "dull plot"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{near[0]:.4f}\tgood film\tfine film"
    words = ["--text", "good film", "--text", "fine film"]
    assert main(["predict", str(run), *words, "--out", str(tmp_path / "v.npy")]) == 0
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.shape == (2, 16)
    assert abs(float(vectors[0] @ vectors[1]) - near[0]) < 1e-4
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    model, params, tokenizer = jpeft.from_pretrained(tmp_path / "merged", task="embedding")
    batch = tokenizer(["good film"])
    np.testing.assert_allclose(model.apply(params, **batch).embedding[0], vectors[0], atol=1e-5)
    assert (tmp_path / "merged" / "1_Pooling" / "config.json").is_file()


@pytest.mark.slow
def test_preferences_are_learnt_and_the_model_still_writes(home: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(home, "answers")
    found = summary_of(run)
    assert found.task == "preference"
    assert found.test["accuracy"] == 1.0
    assert found.test["loss"] < np.log(2)
    assert found.test["likelier"] > found.test["likelier_before"]
    assert "exact_match" not in found.test
    assert (run / runs.SAMPLES).read_text().count("Right:\n\n~~~~\n") == 2
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert "test: reward accuracy 1.0000" in capsys.readouterr().out
    assert main(["predict", str(run), "--text", "the good film"]) == 0
    assert capsys.readouterr().out.endswith("\tthe good film\n")
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    assert jpeft.from_pretrained(tmp_path / "merged")[0].config.task == "causal-lm"
    assert main(["compare", str(run), str(trained(home, "tags")), "--markdown"]) == 0
    table = capsys.readouterr().out
    assert "reward accuracy 1.0000" in table
    assert "F1 " in table


@pytest.mark.slow
def test_log_probs_of_preferences_are_those_of_the_logits(home: Path) -> None:
    job = config.load(home / "answers.yaml")
    loaded = build.load_model(job)
    made = build.batches(job, build.load_data(job, loaded.tokenizer)["test"])
    batch = made.make(0, 1)
    scores = np.asarray(loaded.unadapted(None, loaded.params, batch))
    logits = loaded.model.apply(loaded.params, batch["tokens"].reshape(16, -1)).logits
    logs = np.asarray(jax.nn.log_softmax(logits[:, :-1])).reshape(8, 2, -1, logits.shape[-1])
    want = np.zeros((8, 2))
    for b, s, t in np.argwhere(batch["weights"] > 0):
        want[b, s] += logs[b, s, t - 1, batch["tokens"][b, s, t]]
    assert (want[:2] < 0).all()
    assert not want[2:].any()  # ten rows in batches of eight: the rest fills
    np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "settings", "said"), [
    ("tags", ["data.labels=[O, B-GOOD, I-GOOD]"], "has the tag 'B-BAD', which is none of the 3 labels"),
    ("tags", ["data.labels=[O, I-GOOD]"], "has I-GOOD and no B-GOOD"),
    ("tags", ["data.tags=tag"], "has no column 'tag'; nearest: 'tags'"),
    ("tags", ["data.source={home}/long.jsonl"], "has 2 words and 1 tags"),
    ("tags", ["data.source={home}/text.jsonl"], "are a str, 'good film', expected a list"),
    ("tags", ["data.source={home}/none.jsonl"], "has no words"),
    ("tags", ["data.format=row"], "nearest: 'rows'"),
    ("tags", ["test={generate: {rows: 1}}"], "is for models that write"),
    ("tags", ["objective={beta: 0.2}"], "which has no such field"),
    ("conll", ["data.tag=3"], "has 3 columns"),
    ("conll", ["data.source={home}/ragged.conll"], "line 2 has 2 columns"),
    ("conll", ["data.source={home}/nowhere.conll"], "there is no"),
    ("pairs", ["data.anchor='{txet}'"], "has no column 'txet'; nearest: 'text'"),
    ("pairs", ["data.min_score=null"], "belong together"),
    ("pairs", ["data.score=text"], "expected a number"),
    ("pairs", ["data.min_score=2.0"], "no training row has a score of 2.0 or more"),
    ("pairs", ["data.format=pairs"], "is for the tasks causal-lm, seq2seq"),
    ("pairs", ["objective.beta=0.2"], "objective.beta = 0.2 is not for the loss of these rows, which has temperature"),
    ("answers", ["data.rejected='{good}'"], "60 have the same twice"),
    ("answers", ["data.rejected=bad"], "names no column"),
    ("answers", ["objective={variant: ipo, label_smoothing: 0.1}"], "is for the variant sigmoid"),
    ("answers", ["objective.temperature=1.0"], "which has beta, label_smoothing, variant"),
    ("answers", ["data.max_length=3", "data.keep=start"], "none that is learnt"),
])
def test_mistakes_are_one_line(home: Path, name: str, settings: list[str], said: str, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    for file, row in (("long", {"tokens": ["good", "film"], "tags": ["O"]}), ("none", {"tokens": [], "tags": []}),
                      ("text", {"tokens": "good film", "tags": ["O"]})):
        (home / f"{file}.jsonl").write_text(json.dumps(row))
    (home / "ragged.conll").write_text("good X O\nfilm O\n")
    sets = [word for one in (*settings, f"output={tmp_path / 'runs'}") for word in
            ("--set", one.replace("{home}", str(home)))]
    assert main(["train", str(home / f"{name}.yaml"), *sets]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_vectors_are_of_embeddings_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(home, "tags")
    for words, said in ((["--out", "v.npy"], "is for models of embeddings, and this one is for token-classification"),
                        (["--out", "v.txt"], "must be a file that ends in .npy")):
        assert main(["predict", str(run), "--text", "good", *words]) == 1
        assert said in capsys.readouterr().err
    run = trained(home, "pairs")
    for texts, said in ((["good"], "one text alone"), (["good\tfine", "bad"], "give pairs, or none")):
        assert main(["predict", str(run), *(w for text in texts for w in ("--text", text))]) == 1
        assert said in capsys.readouterr().err


def test_the_head_of_a_table_of_several_tasks() -> None:
    one = runs.RunSummary(1, 1, "finished", task="embedding", test={"mrr": 0.5, "recall_at_1": 0.25})
    assert tables.compared([one])[0][3] == "MRR 0.5000"
    assert tables.heads([one])[3] == "test"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tags", "pairs"])
def test_transformers_reads_what_was_merged(home: Path, name: str, tmp_path: Path) -> None:
    """Outputs of the merged folder in transformers equal those of the adapter beside the weights."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    run = trained(home, name)
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    adapted = build.load_adapter(build.load_model(runs.read(run)), run / runs.ADAPTER)
    batch = adapted.loaded.tokenizer(["the good film is bad", "warm"])
    ids, mask = (torch.tensor(batch[key]).long() for key in ("tokens", "attention_mask"))
    kind: Any = transformers.AutoModelForTokenClassification if name == "tags" else transformers.AutoModel
    model = kind.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask)
    if name == "tags":
        assert type(model).__name__ == "BertForTokenClassification"
        assert list(model.config.id2label.values()) == ["O", "B-GOOD", "I-GOOD", "B-BAD"]
        mine = adapted.apply(adapted.trainable, adapted.frozen, batch["tokens"], batch["attention_mask"])
        theirs = out.logits.numpy()
    else:
        rows = {key: batch[key][:, None] for key in ("tokens", "attention_mask")}
        mine = adapted.apply(adapted.trainable, adapted.frozen, rows)[:, 0]
        weight = mask[..., None].float()
        theirs = (out.last_hidden_state * weight).sum(1) / weight.sum(1)
        theirs = (theirs / theirs.norm(dim=-1, keepdim=True)).numpy()
    real = batch["attention_mask"] > 0 if name == "tags" else np.ones(2, bool)
    gap = np.abs(np.asarray(mine) - theirs)[real].max()
    assert gap <= 1e-5 * np.abs(theirs[real]).max()
