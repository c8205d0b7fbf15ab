"""Kill, double, starve and flip every command, and compare what is left with an undisturbed run, byte for byte.

    python tests/crash/harness.py                          every attack on every command (the long run; minutes a command)
    python tests/crash/harness.py --commands train --attacks kills renames --count 20
    python -m pytest tests/crash -m long                   the same, as tests

Attacks: `kills` at random moments (a third of them twice), `renames`: killed just before and just after every rename, `two`: two processes
started on one folder, `full`: a disk of twenty sizes that are too small, then room, `flips`: one bit of each saved state and cache.
An attack counts as survived if the command, started again as a user would, ends with exit code 0 and the bytes of the undisturbed run; or,
for a flipped bit, if it refuses in one line. A different result with exit code 0, a traceback or a left-over temporary is a failure.
"""
import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
from world import Command, build, calm, commands, preload  # noqa: E402

ATTACKS = ("kills", "renames", "two", "full", "flips")
VOLATILE = {"timing.jsonl", "SHA256SUMS"}  # times; and the hashes, which hold those of timing.jsonl
LEFT = (".tmp", ".partial", ".old")


class World:
    """Inputs in a folder, and the runs on them. `python` imported everything already: a run is a fork."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "lora.safetensors").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            build(folder)
            self.every = commands(folder)
            self.run(self.every["train"], folder / "first")
            self.run(self.every["prepare"], folder / "older")
            shutil.copy(folder / "first" / "lora.safetensors", folder / "lora.safetensors")
        preload()
        self.every = commands(folder)
        self.undisturbed: dict[str, tuple[dict, float]] = {}

    def place(self, attack: str, command: Command) -> Path:
        """Where an attack's run writes: everywhere a folder of the same name, which a report prints."""
        folder = self.folder / "out" / attack
        folder.mkdir(parents=True, exist_ok=True)
        return folder / command.name

    def start(self, command: Command, out: Path, again: bool = False, kill: tuple[int | str, bool] | None = None) -> int:
        """Fork a run; its process id. kill: (number of the rename, whether after it). What it prints goes to `out`'s name + .log."""
        process = os.fork()
        if process:
            return process
        code = 70
        try:
            log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for number in (1, 2):
                os.dup2(log, number)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # not pytest's  # noqa: SIM115
            os.environ["SOURCE_DATE_EPOCH"] = "0"
            os.chdir(out.parent)
            calm()
            if kill:
                count_renames(*kill)
            from lesion.run import cli
            sys.argv = [command.name]
            cli.run(lambda: command.main([str(word) for word in command.argv(out, again)]), command.name)
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def run(self, command: Command, out: Path, **how) -> int:
        """The exit code of a run; -9 if it was killed."""
        return wait(self.start(command, out, **how))

    def fresh(self, command: Command, out: Path) -> None:
        for left in (out, Path(f"{out}.log"), *out.parent.glob(f".{out.name}.*")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
        command.prepare(out)

    def expected(self, command: Command) -> tuple[dict, float]:
        """({name: SHA-256} of an undisturbed run, its seconds); the second of two, when all caches are there, and both equal."""
        if command.name not in self.undisturbed:
            trees = []
            for out in (self.place("undisturbed", command),) * 2:
                self.fresh(command, out)
                began = time.monotonic()
                code = self.run(command, out)
                assert code == 0, f"{command.name} undisturbed: exit code {code}\n{log_of(out)}"
                trees.append((tree(out), time.monotonic() - began))
            assert trees[0][0] == trees[1][0], f"{command.name}: two undisturbed runs differ in {differing(trees[0][0], trees[1][0])}"
            self.undisturbed[command.name] = trees[1]
        return self.undisturbed[command.name]

    def verdict(self, command: Command, out: Path, code: int, may_refuse: bool = False) -> str:
        """"" if the run ended as it should; else what is wrong."""
        text = log_of(out)
        if "Traceback" in text:
            return "traceback: " + text[-600:]
        if may_refuse and code == 2:
            return "" if text.strip() else "refused without a word"
        if code:
            return f"exit code {code}: {text[-400:]}"
        found, expected = tree(out), self.expected(command)[0]
        if found != expected:
            return f"differs in {differing(found, expected)}"
        left = [path.name for path in [*out.rglob("*"), *out.parent.glob(f".{out.name}*")] if path.name.endswith(LEFT)]
        return f"left {left}" if left else ""


def count_renames(number: int | str, after: bool) -> None:
    """SIGKILL this process at its rename `number` (from 1), or at the second to a name that ends so, before or after it is done."""
    from lesion.run import folders
    count, ending = 0, number if isinstance(number, str) else ""
    number = 2 if ending else number

    def counted(real):
        def rename(*arguments, **more):
            nonlocal count
            if not str(arguments[1]).endswith(ending):
                return real(*arguments, **more)
            count += 1
            if count == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **more)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return rename
    os.replace, os.rename, os.link = counted(os.replace), counted(os.rename), counted(os.link)
    folders._exchange = counted(folders._exchange)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def log_of(out: Path) -> str:
    path = Path(f"{out}.log")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def clear_log(out: Path) -> None:
    Path(f"{out}.log").unlink(missing_ok=True)


def tree(out: Path) -> dict[str, str]:
    """{name: SHA-256} of what a command left: hidden files, times and damaged files that were put aside do not count."""
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name not in VOLATILE and ".damaged" not in path.name
            and not any(part.startswith(".") for part in path.relative_to(out).parts)}


def differing(one: dict, other: dict) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))[:6]


# --- the attacks: each yields (what was done, what is wrong or "") -----------------------------------------------------


def kills(world: World, command: Command, count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """SIGKILL at random moments of the whole run, every third run at a random moment of its restart too."""
    seconds, out = world.expected(command)[1], world.place("killed", command)
    for number in range(count):
        world.fresh(command, out)
        moments = []
        for again in range(1 + (number % 3 == 2)):
            moments.append(rng.uniform(0.02, 1.0) * seconds)
            process = world.start(command, out, again=bool(again))
            time.sleep(moments[-1])
            os.kill(process, signal.SIGKILL)
            wait(process)
        clear_log(out)
        code = world.run(command, out, again=True)
        yield f"killed after {', '.join(f'{moment:.2f}' for moment in moments)} s", world.verdict(command, out, code)


def renames(world: World, command: Command, count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """SIGKILL before and after every rename and link (for a `count` under 20, of so many of them)."""
    world.expected(command)
    out, number = world.place("renamed", command), 0
    while True:
        number += 1
        if count < 20:
            number += rng.randrange(3)
        for after in (False, True):
            world.fresh(command, out)
            code = world.run(command, out, kill=(number, after))
            if code != -signal.SIGKILL:
                return
            clear_log(out)
            code = world.run(command, out, again=True)
            yield f"killed {'after' if after else 'before'} rename {number}", world.verdict(command, out, code)
        if number >= count and count < 20:
            return


def two(world: World, command: Command, count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Two processes started on one folder within a tenth of a run; then once more, alone, as the refused user would."""
    seconds, out = world.expected(command)[1], world.place("two", command)
    for _ in range(count):
        world.fresh(command, out)
        gap = rng.uniform(0, 0.1) * seconds
        first = world.start(command, out, again=True)
        time.sleep(gap)
        second = world.start(command, out, again=True)
        codes = sorted((wait(first), wait(second)))
        said = [line for line in log_of(out).splitlines() if "is in use by" in line]
        wrong = world.verdict(command, out, 0)
        if not wrong and codes not in ([0, 0], [0, 2]):
            wrong = f"exit codes {codes}: {log_of(out)[-300:]}"
        if not wrong and codes == [0, 2] and not (len(said) == 1 and command.name.split()[0] in said[0] and "process" in said[0]):
            wrong = f"the second did not say who holds the folder: {log_of(out)[-300:]}"
        yield f"two, {gap:.2f} s apart: {'one refused' if codes == [0, 2] else 'one after the other'}", wrong


def full(world: World, command: Command, count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Disks too small by a random share of what the run needs; then room, and started again."""
    world.expected(command)
    need = sum(path.stat().st_size for path in world.place("undisturbed", command).rglob("*") if path.is_file())
    disk = world.folder / "disk"
    disk.mkdir(exist_ok=True)
    out = disk / command.name
    for _ in range(count):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m,mode=755", "tmpfs", disk], check=True)
        try:
            command.prepare(out)
            room = os.statvfs(disk)
            used = (room.f_blocks - room.f_bfree) * room.f_frsize
            size = used + int(need * rng.uniform(0.02, 1.0)) // 4096 * 4096 + 8192
            subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
            log = world.place("full", command)
            clear_log(log)
            with redirected(out, log):
                code = world.run(command, out)
                text, wrong = log_of(log), ""
                if "Traceback" in text or code not in (0, 2):
                    wrong = f"exit code {code}: {text[-600:]}"
                elif code == 2 and "disk is full" not in text and "No space left" not in text:
                    wrong = f"does not say that the disk is full: {text[-300:]}"
                subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
                if not wrong:
                    clear_log(log)
                    again = world.run(command, out, again=True)
                    found, expected = tree(out), world.expected(command)[0]
                    wrong = f"then exit code {again}: {log_of(log)[-400:]}" if again else \
                        f"then differs in {differing(found, expected)}" if found != expected else ""
        finally:
            subprocess.run(["umount", disk], check=True)
        yield f"a disk of {size >> 10} KiB (exit code {code})", wrong


@contextlib.contextmanager
def redirected(out: Path, log: Path):
    """The log of a run on the small disk is kept elsewhere."""
    link = Path(f"{out}.log")
    link.symlink_to(f"{log}.log")
    yield
    link.unlink(missing_ok=True)


def flips(world: World, command: Command, count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """One bit of each saved state and cache, `count` times each: detected, healed or without effect."""
    world.expected(command)
    out, kept = world.place("flipped", command), world.place("kept", command)
    for pattern in command.states:
        place, part_way = (world.folder, False) if pattern.startswith("/") else (out, True)
        world.fresh(command, out)
        if part_way:
            code = world.run(command, out, kill=(command.cut, True) if command.cut else None)
            assert code == (-signal.SIGKILL if command.cut else 0), f"{command.name}: exit code {code}: {log_of(out)}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(out, kept)
        for _ in range(count):
            if part_way:
                shutil.rmtree(out)
                shutil.copytree(kept, out)
            else:
                world.fresh(command, out)
            target = rng.choice(sorted(place.glob(pattern.lstrip("/"))))
            data = bytearray(target.read_bytes())
            bit = rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            whole = target.read_bytes()
            target.write_bytes(data)
            clear_log(out)
            code = world.run(command, out, again=True)
            wrong = world.verdict(command, out, code, may_refuse=True)
            if not part_way:
                target.write_bytes(whole)
            yield f"bit {bit} of {target.name}: {'refused' if code == 2 else 'same result'}", wrong


def may_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


def attack(world: World, name: str, kind: str, count: int, seed: int = 0, say=print) -> tuple[int, list[str]]:
    """(attacks made, failures) of one kind on one command."""
    done, failures = 0, []
    for what, wrong in globals()[kind](world, world.every[name], count, random.Random(f"{name} {kind} {seed}")):
        done += 1
        if wrong:
            failures.append(f"{name}, {what}: {wrong}")
            say(f"FAILED {failures[-1]}")
    return done, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--commands", nargs="+")
    parser.add_argument("--attacks", nargs="+", default=ATTACKS, choices=ATTACKS)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lesion-crash", help="kept: the inputs are made once")
    args = parser.parse_args()
    world = World(args.folder)
    bad = 0
    for name in args.commands or world.every:
        for kind in args.attacks:
            began = time.monotonic()
            done, failures = attack(world, name, kind, args.count, args.seed)
            bad += len(failures)
            print(f"{name:9} {kind:8} {done - len(failures):4} of {done:4} survived   {time.monotonic() - began:5.0f} s", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
