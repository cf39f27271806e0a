"""File names in annotations that lead out of the data folder: refused, and nothing outside is opened.

python paths.py
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from outcome import Outcome, Stopwatch, in_own_process

from vislm.errors import VislmError


def trial() -> Outcome:
    """Put every name into two kinds of annotation files and run the benchmarks."""
    watch = Stopwatch()
    found = in_own_process("paths.py")
    failures = [found["crashed"]] if "crashed" in found else found.pop("failures")
    return Outcome("file names that leave the data folder", found.pop("cases", 0), found, watch.seconds, failures)


def _names(secret: Path) -> list[str]:
    return [
        "../secret.png",
        "../../secret.png",
        "./../secret.png",
        "a/../../secret.png",
        "a/b/../../../secret.png",
        "images/../../secret.png",
        "..",
        "../",
        "....//..//secret.png/..",
        "..\\secret.png",
        "a\\..\\..\\secret.png",
        "a/..\\../secret.png",
        "C:\\secret.png",
        "C:secret.png",
        "\\\\host\\share\\secret.png",
        "//host/share/secret.png",
        str(secret),
        "/etc/passwd",
        "\\secret.png",
        "a\0/../../secret.png",
        "\0",
        "",
    ]


def main() -> dict:
    from vislm.data.scenes import write_scenes

    outside: list[str] = []
    failures, cases = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        data = write_scenes(Path(scratch) / "data", 3, 1)
        secret = Path(scratch) / "secret.png"
        shutil.copy(data / "images" / "000001.png", secret)
        watched = [str(secret), "/etc/passwd"]
        sys.addaudithook(lambda event, args: outside.append(str(args[0])) if _is_open(event, args, watched) else None)
        for name in _names(secret):
            for kind in ("coco", "pope"):
                folder = Path(scratch) / f"case{cases}"
                _write(data, folder, kind, name)
                if not _refused(folder):
                    failures.append(f"{kind}: {name!r} is accepted")
                cases += 1
    failures += [f"{path} was opened" for path in outside]
    return {"cases": cases, "accepted": len(failures) - len(outside), "opened": len(outside), "failures": failures}


def _is_open(event: str, args: tuple, watched: list[str]) -> bool:
    if event != "open" or not isinstance(args[0], (str, bytes)):
        return False
    return str(Path(str(args[0])).resolve()) in watched if "\0" not in str(args[0]) else False


def _write(data: Path, folder: Path, kind: str, name: str) -> None:
    folder.mkdir()
    (folder / "images").symlink_to(data / "images")
    if kind == "pope":
        row = {"question_id": 1, "image": name, "text": "Is there a dog in the image?", "label": "yes"}
        (folder / "q_random.json").write_text(json.dumps(row))
        return
    content = json.loads((data / "instances.json").read_text())
    content["images"][0]["file_name"] = name
    (folder / "instances.json").write_text(json.dumps(content))


def _refused(folder: Path) -> bool:
    from vislm.eval.benchmarks import load_benchmark
    from vislm.eval.running.runner import run

    class Blind:
        def fingerprint(self) -> dict:
            return {}

        def respond(self, batch, *, max_new_tokens) -> list[dict]:
            return [{"text": "", "seconds": 0.0} for _ in batch]

    try:
        run(load_benchmark("pope", folder), Blind(), folder / "out")
    except VislmError:
        return True
    return False


if __name__ == "__main__":
    print(json.dumps(main()))
