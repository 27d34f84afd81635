"""Everything that waits for a GPU, in pieces of at most 9 minutes: one command, which can be stopped and continues.

    python benchmarks/gpu_prepare.py gpu --data ../shared/data        # elsewhere, with a network: wheels and shards
    make gpu                                                          # on the machine with the GPU: installs, and runs
    python benchmarks/gpu.py run --folder gpu --out gpu/results       # the same without installing
    python benchmarks/gpu.py run --minutes 9                          # as many pieces as fit; again for the next ones
    python benchmarks/gpu.py list

`benchmarks/gpu_pieces.py` is the table of pieces. Each is a process of its own, and writes three files into --out:
PIECE.json (device, versions, command, commit, and the piece's figures), PIECE.md (the same as a table) and PIECE.log.
`report.md` has the tables of all pieces, and `state.json` how each of them ended. Pieces that never ran come first, and
those that failed or were cut off are tried again after them; a piece that is done is not run again, unless --only names
it. A recipe that trains for longer than a piece saves its state, and its piece goes on in the next turn.

--tiny runs the same commands with small sizes on a CPU, with the Triton kernels in Triton's interpreter, to find
mistakes without a GPU. Its figures mean nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from about import about
from gpu_pieces import PIECES, Options, Piece

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT = 9.0
"""Minutes after which a piece is stopped."""
UNFINISHED = 75
"""Exit status of a piece that has saved its state and goes on in the next turn; the system's EX_TEMPFAIL."""
DONE, GOES_ON, FAILED, CUT_OFF, RUNNING = "done", "goes on", "failed", "cut off", "running"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "list"])
    parser.add_argument(
        "--folder", type=Path, default=Path("gpu"), help="from gpu_prepare.py: wheels, shards, checkouts"
    )
    parser.add_argument("--out", type=Path, help="folder for results; FOLDER/results by default")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="run these pieces, also if they are done")
    parser.add_argument("--minutes", type=float, help="begin no piece that would end later; all pieces by default")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with small sizes on a CPU")
    args = parser.parse_args()
    out = (args.out or args.folder / ("tiny" if args.tiny else "results")).resolve()
    options = Options.find(args.folder.resolve(), out, args.tiny)
    unknown = set(args.only or ()) - {piece.name for piece in PIECES}
    if unknown:
        sys.exit(f"there is no piece {min(unknown)}; choose from: {', '.join(piece.name for piece in PIECES)}")
    if args.what == "list":
        list_pieces(options, State(out))
    else:
        sys.exit(run(options, State(out), args.only, args.minutes))


class State:
    """How each piece ended, in `state.json`. A piece that is `running` there was killed with its program."""

    def __init__(self, out: Path) -> None:
        self.file = out / "state.json"
        self.pieces: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def of(self, piece: Piece) -> dict[str, Any]:
        return self.pieces.get(piece.name, {"status": "", "turns": 0, "seconds": 0.0})

    def set(self, piece: Piece, status: str, seconds: float, turns: int) -> None:
        self.pieces[piece.name] = {"status": status, "turns": turns, "seconds": round(seconds, 1)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_suffix(".aside")
        aside.write_text(json.dumps(self.pieces, indent=1) + "\n")
        os.replace(aside, self.file)


def list_pieces(options: Options, state: State) -> None:
    for piece in PIECES:
        known, missing = state.of(piece), piece.missing(options)
        print(f"{piece.name:24} {known['status'] or (f'needs {missing}' if missing else 'not begun'):24} {piece.title}")


def run(options: Options, state: State, only: list[str] | None, minutes: float | None) -> int:
    """Run what is due. 0: all that can run is done. 1: something failed. `UNFINISHED`: something is left."""
    ends = time.monotonic() + 60 * minutes if minutes else float("inf")
    due = [p for p in PIECES if (p.name in only if only else state.of(p)["status"] != DONE)]
    due = sorted(due, key=lambda piece: state.of(piece)["turns"])  # stable: otherwise in the order of the table
    left = 0
    for piece in [*(p for p in due if not p.after), *(p for p in due if p.after)]:
        remaining = min(60 * LIMIT, ends - time.monotonic())
        waits = piece.after and state.pieces.get(piece.after, {}).get("status") != DONE
        if missing := piece.missing(options):
            print(f"{piece.name}: skipped, {missing} is missing", flush=True)
        elif waits or (minutes and remaining < 60 * piece.minutes):
            print(f"{piece.name}: later, {f'after {piece.after}' if waits else 'the time left is short'}", flush=True)
            left += 1
        else:
            turn(piece, options, state, remaining)
    write_report(options, state)
    ended = [state.of(piece)["status"] for piece in due]
    if any(status in (FAILED, CUT_OFF) for status in ended):
        return 1
    return UNFINISHED if left or GOES_ON in ended else 0


def turn(piece: Piece, options: Options, state: State, seconds: float) -> None:
    """One turn of a piece: run its command, and write its record and its table."""
    turns, figures = state.of(piece)["turns"] + 1, options.out / "raw" / f"{piece.name}.json"
    figures.parent.mkdir(parents=True, exist_ok=True)
    figures.unlink(missing_ok=True)
    state.set(piece, RUNNING, 0, turns)
    command = [sys.executable, *piece.command(options), "--json", str(figures)]
    print(f"{piece.name}: {piece.title} ...", flush=True)
    start = time.monotonic()
    status = execute(command, options, piece, seconds)
    took = time.monotonic() - start
    result, problem = read(figures)
    if problem and status == DONE:
        status = FAILED
    table = ""
    if result is not None:
        try:
            table = piece.table(result)
        except (KeyError, TypeError, ValueError, IndexError) as error:  # the record below has the figures all the same
            status, problem = FAILED, f"no table: {type(error).__name__}: {error}"
    facts = about(SimpleNamespace(device="cuda" if torch.cuda.is_available() else "cpu", threads=None))
    facts["command"] = " ".join(["python", *(shown(word, options) for word in command[1:-2])])
    record = {"piece": piece.name, "status": status, "problem": problem, "seconds": round(took, 1), "turn": turns}
    text = json.dumps({**record, "about": facts, "result": result}, indent=1) + "\n"
    (options.out / f"{piece.name}.json").write_text(text)
    head = f"## {piece.title}\n\n{facts['device']}, torch {facts['torch']}, commit {str(facts['commit'])[:9]}: {status}"
    code = f"```bash\n{facts['command']}\n```"
    (options.out / f"{piece.name}.md").write_text("\n\n".join(filter(None, [head, problem, table, code])) + "\n")
    state.set(piece, status, took, turns)
    print(f"{piece.name}: {status} after {took:.0f} s{f' ({problem})' if problem else ''}", flush=True)


def execute(command: list[str], options: Options, piece: Piece, seconds: float) -> str:
    """Run a command with its output in PIECE.log, and stop it and its children after that time. How it ended."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "ssl"), os.environ.get("PYTHONPATH", "")])
    }
    environment |= {"PYTHONUNBUFFERED": "1", "SELFVIL_TEST_DATA": str(options.folder)}
    if options.tiny:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= {"TRITON_INTERPRET": "1"} if piece.interpreted else {}
    with open(options.out / f"{piece.name}.log", "a") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            return CUT_OFF
        except BaseException:
            stop(process)
            raise
    return {0: DONE, UNFINISHED: GOES_ON}.get(code, FAILED)


def stop(process: subprocess.Popen) -> None:
    """Ask a process and its children to end, which lets a run save its state, and end them 20 s later."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def read(figures: Path) -> tuple[Any, str | None]:
    """What the piece has written, or why there is nothing."""
    try:
        return json.loads(figures.read_text()), None
    except OSError:
        return None, "it wrote no figures; its log has the reason"
    except ValueError as error:
        return None, f"its figures cannot be read: {error}"


def shown(word: str, options: Options) -> str:
    """A word of a command without absolute paths of this machine."""
    for folder, name in ((options.out, "OUT"), (options.folder, "FOLDER"), (REPOSITORY, "")):
        word = word.replace(f"{folder}/", f"{name}/" if name else "").replace(str(folder), name or ".")
    return f"'{word}'" if any(letter in word for letter in "*{ ") else word


def write_report(options: Options, state: State) -> None:
    tables = [options.out / f"{piece.name}.md" for piece in PIECES if piece.name in state.pieces]
    text = "\n".join(table.read_text() for table in tables if table.exists())
    if text:
        (options.out / "report.md").write_text(text)
        print(f"tables: {options.out / 'report.md'}")


if __name__ == "__main__":
    main()
