"""Faults as they happen to a run: each ends in one clear line, and nothing is lost."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from crashes import FLAGS, LONG, PROGRAM, ROOT, environment, faults, outcome, points, recorded, tell

from lstmjax import training
from lstmjax.errors import UserError

LONG_RUN = (*FLAGS[:-4], "--epochs", "2000")


@pytest.fixture
def whole(recorded):
    """A run without any fault."""
    return recorded[0]


def run(environment, *arguments, **options):
    options = {"capture_output": True, "text": True, "timeout": 200} | options
    return subprocess.run([*PROGRAM, *map(str, arguments)], env=environment, **options)


def one_error(done, status):
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


# -- signals --------------------------------------------------------------------------------------


def started(environment, folder, output):
    command = [*PROGRAM, *LONG_RUN, "--run-dir", str(folder)]
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def read_until(pipe, text):
    seen = b""
    while text not in seen:
        piece = os.read(pipe, 4096)
        assert piece, seen
        seen += piece
    return seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_when_nobody_reads_the_output(environment, tmp_path, number):
    """As under ``2>&1 | tee log`` when Ctrl-C ends tee first, or when ssh is gone."""
    reader, writer = os.pipe()
    process = started(environment, tmp_path / "run", writer)
    os.close(writer)
    read_until(reader, b"epoch 2/")
    os.close(reader)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    steps = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(steps) >= 4
    assert not list((tmp_path / "run").rglob("*.tmp"))
    tell(f"{number.name}, nobody reads the output", "pipe closed, signal sent", 1, "(nobody reads)")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("where", ["head and full", "closed"])
def test_output_that_fails_stops_nothing(environment, whole, tmp_path, where):
    command = " ".join([*PROGRAM, *FLAGS, "--run-dir", str(tmp_path / "run")])
    ends = {"head and full": "2>/dev/full | head -1", "closed": "<&- >&- 2>&-"}[where]
    shell = f"set -o pipefail; {command} {ends}"
    subprocess.run(["bash", "-c", shell], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert outcome(tmp_path / "run") == outcome(whole)
    tell(f"output: {where}", f"`{ends}`", 1, "nothing: the run ends as it would have")


def test_signals_while_importing(environment, tmp_path):
    """At several times from the first line of the program on: no traceback, the right status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-v", PROGRAM[1], "--help"], env=environment, stderr=subprocess.PIPE
        )
        seen = read_until(process.stderr.fileno(), b"import 'jax.version'")  # of -v
        process.send_signal(number)
        rest = process.communicate(timeout=60)[1]
        assert process.returncode == 128 + number
        assert b"Traceback" not in seen + rest
        assert f"stopped by {number.name}; nothing was begun".encode() in rest
        words = f"stopped by {number.name}; nothing was begun"
        tell(f"{number.name} while importing", "sent at an import", 1, words)


def test_a_signal_while_it_compiles(environment, tmp_path):
    """The bar of the first epoch is there before its first step is compiled."""
    cold = {**environment, "LSTMJAX_CACHE_DIR": str(tmp_path / "cache")}
    command = [*PROGRAM, "--data", "demo", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, env=cold, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    read_until(process.stderr.fileno(), b"epoch 1/3")
    begun = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    took = time.perf_counter() - begun
    assert process.returncode == 143
    assert b"stopped and saved; go on: the same command with --resume" in out
    assert took < 5 or not LONG
    tell("SIGTERM while compiling", f"at the first bar, took {took:.1f} s", 1, "stopped and saved")


PREPARE = """
import os, signal, sys, threading
from lstmjax import stopping
stopping.exit_on_signals()
from lstmjax.data import archive, imdb
archive.check_archive = lambda *_: None
def forever(folder, *_):
    (folder / "half").mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()
imdb._run_tfds = forever
imdb.load_imdb("train", data_dir=sys.argv[1], archive="a", progress=False)
"""


def test_a_signal_while_it_prepares_data(environment, tmp_path):
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "data")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 143
    assert done.stderr.strip() == "stopped by SIGTERM; nothing was begun"
    assert list((tmp_path / "data").iterdir()) == []
    tell("SIGTERM while preparing data", "sent by itself", 1, done.stderr.strip())


# -- two in one place -----------------------------------------------------------------------------


def test_a_run_in_use_is_not_gone_on_with(environment, tmp_path):
    reader, writer = os.pipe()
    first = started(environment, tmp_path / "run", writer)
    os.close(writer)
    read_until(reader, b"epoch 1/")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for start in (False, True):
        with pytest.raises(UserError, match=f"run is in use by process {first.pid}: wait for it"):
            training.RunFolder.open("", config, path=tmp_path / "run", resume=True, start=start)
    first.kill()  # its lock dies with it
    first.wait()
    os.close(reader)
    training.RunFolder.open("", config, path=tmp_path / "run", resume=True).close()
    words = "... is in use by process N: wait for it, or stop it, or name another --run-dir"
    tell("two runs in one folder", "resumed while it runs", 2, words)


def test_of_many_that_start_at_once_each_gets_a_folder_of_its_own(tmp_path):
    code = (
        "import sys; from lstmjax.training import RunFolder; sys.stdin.read()\n"
        "run = RunFolder.open('name', {}); print(run.path)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.close()
        process.stdin = None
    folders = {process.communicate()[0].strip() for process in processes}
    assert len(folders) == 4
    assert "" not in folders
    tell("runs started at once", "processes that want the same name", 4, "each its own folder")


# -- a disk that fails ----------------------------------------------------------------------------

FAIL = """
import contextlib, ctypes, functools, io, json, os, sys
from lstmjax.commands import imdb
from lstmjax.training.command import run_command
imdb.load_demo = functools.cache(imdb.load_demo)
reset = ctypes.CDLL(None).faults_reset
for case in json.loads(sys.stdin.read()):
    os.environ.update(case["faults"])
    reset()
    sys.argv = ["imdb.py", *case["flags"]]
    said, status = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_command(imdb.RECIPES, imdb.main, "")
        except SystemExit as stop:
            status = stop.code
    for name in case["faults"]:
        del os.environ[name]
    print(json.dumps([status, said.getvalue()]))
"""
NEVER = {"FAULTS_FROM": "1000000000"}
FAULTS = {
    "disk full": (28, True, "No space left on device", 74),
    "input/output error": (5, False, "Input/output error", 74),
    "file too large": (27, False, "File too large", 74),
    "read-only": (30, True, "Read-only file system", None),
    "no permission": (13, True, "Permission denied", None),
}


@pytest.mark.slow
def test_a_disk_that_fails(environment, whole, tmp_path):
    """At any change: one line, the right status; once it is mended, the run ends the same."""
    cases, wanted, example = [], outcome(whole), {}
    for name, (number, stays, words, status) in FAULTS.items():
        for at in points(330, some=1, seed=number, many=30):
            folder = str(tmp_path / f"{name}-{at}")
            flags = [*FLAGS, "--run-dir", folder, "--resume-or-start"]
            fault = {"FAULTS_FROM": str(at + 1), "FAULTS_ERRNO": str(number)}
            fault["FAULTS_TO"] = str(10**9 if stays else at + 1)
            cases.append((name, at, words, status, {"flags": flags, "faults": fault}))
            cases.append((name, at, None, 0, {"flags": flags, "faults": NEVER}))
    done = subprocess.run(
        [sys.executable, "-c", FAIL],
        env=environment | faults(tmp_path),
        input=json.dumps([case for *_, case in cases]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (name, at, words, status, case), line in zip(cases, done.stdout.splitlines(), strict=True):
        found, said = json.loads(line)
        errors = [text for text in said.splitlines() if text.startswith("error: ")]
        assert "Traceback" not in said, (name, at, said)
        if words is None:
            assert found == 0, (name, at, said)
            assert outcome(pathlib.Path(case["flags"][-2])) == wanted, (name, at)
        elif found:  # a change that costs nothing, such as the curves', may fail
            assert len(errors) == 1, (name, at, said)
            assert words in errors[0], (name, at, said)
            assert found == status or (status is None and found in (2, 74)), (name, at, said)
            example[name] = f"exit {found}: `{errors[0].replace(str(tmp_path), '...')}`"
    for name in FAULTS:
        times = sum(case[0] == name for case in cases) // 2
        tell(
            f"{name}, then mended",
            "a change of a file fails, or all from then on",
            times,
            example.get(name, ""),
        )


# -- odd surroundings -----------------------------------------------------------------------------

SURROUNDINGS = {
    "letters": {"JAX_ENABLE_X64": "1", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    "no home": {"HOME": "/proc/nothing", "LSTMJAX_CACHE_DIR": "", "XDG_CACHE_HOME": ""},
    "no such home": {"LSTMJAX_CACHE_DIR": "~nosuchuser/x"},
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_odd_surroundings(environment, tmp_path, name):
    folder, cumsum = tmp_path / "zürich", str(ROOT / "experiments" / "cumsum.py")
    done = subprocess.run(
        [sys.executable, cumsum, "--updates", "20", "--run-dir", folder],
        env={**environment, **SURROUNDINGS[name]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "result.json").read_text())["parameters"] == 1781
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    unkept = "" if name == "letters" else "compiled programs are not kept: "
    assert done.stderr.startswith(unkept)
    assert "Traceback" not in done.stderr
    assert name == "no home" or len(done.stderr.splitlines()) == (name != "letters")


BACKWARDS = """
import itertools, sys, time
begin = time.time()
hours = itertools.count(1)
time.time = lambda: begin - 3600 * next(hours)
time.time_ns = lambda: int(1e9 * time.time())
from lstmjax.commands import imdb
from lstmjax.training.command import run_command
run_command(imdb.RECIPES, imdb.main, "")
"""


@pytest.mark.slow
def test_a_clock_that_goes_backwards(environment, whole, tmp_path):
    """By an hour each time that it is asked, in a run that is begun, and in one that goes on."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", BACKWARDS, *FLAGS, "--run-dir", str(folder)]
    for go_on in ([], ["--resume"]):
        shutil.rmtree(folder / "checkpoints" / "8", ignore_errors=True)
        done = subprocess.run(
            [*command, *go_on], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert outcome(folder) == outcome(whole)
    words = "nothing: the run ends as it would have"
    tell("the clock goes backwards", "an hour each time that it is asked", 2, words)


def test_help_in_a_narrow_terminal(environment):
    done = run({**environment, "COLUMNS": "5"}, "--help")
    assert done.returncode == 0
    assert "--resume-or-start" in done.stdout


def test_what_a_config_says_reaches_the_terminal_escaped(environment, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text())
    hostile = json.dumps({**config, "cell": "\x1b[2J\u202e" + "x" * 99})
    for name in ("config.json", ".config.json"):
        (folder / name).write_text(hostile)
    line = one_error(run(environment, *FLAGS, "--run-dir", folder, "--resume"), 2)
    assert r"cell: \x1b[2J\u202exxx" in line
    assert len(line) < 500
    assert line.isprintable()


CONFIGS = {
    "empty": b"",
    "half": b'{"cell": "LS',
    "a list": b"[]",
    "nested": b'{"a":' * 100_000,
    "no letters": b"\xff\xfe",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_start_that_was_cut_short_is_no_dead_end(tmp_path, name, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes(CONFIGS[name])
    with pytest.raises(UserError, match=r"nothing to resume.*start without --resume"):
        training.RunFolder.open("n", {"a": 1}, path=tmp_path / "run", resume=True)
    with training.RunFolder.open("n", {"a": 1}, path=tmp_path / "run") as again:
        assert again.config() == {"a": 1}
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "config.json").write_bytes(CONFIGS[name])
    with training.RunFolder.open("n", {"a": 1}, path=tmp_path / "run", resume=True):
        assert "config.json is damaged: its copy is taken" in capsys.readouterr().err
    with pytest.raises(UserError, match="a: 1 there, 2 here"):
        training.RunFolder.open("n", {"a": 2}, path=tmp_path / "run", resume=True)
    (tmp_path / "run" / ".config.json").unlink()
    (tmp_path / "run" / "config.json").write_bytes(CONFIGS[name])
    with pytest.raises(UserError, match=r"put a copy of config.json back"):
        training.RunFolder.open("n", {"a": 1}, path=tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"put a copy of config.json back"):
        training.RunFolder.open("n", {"a": 1}, path=tmp_path / "run", resume=True, start=True)
    with pytest.raises(UserError, match="is not empty"):
        training.RunFolder.open("n", {"a": 1}, path=tmp_path / "run")
    tell(f"config.json: {name}", "written", 1, "... is damaged: its copy is taken")


def test_a_value_of_the_config_that_was_changed_is_put_back(tmp_path, capsys):
    """If it alone differs from what is asked for; and of two long values it is said which."""
    config = {"rate": 0.25, "data_sha256": ["a" * 64, "b" * 64]}
    training.RunFolder.create(tmp_path / "run", config).close()
    place = tmp_path / "run" / "config.json"
    whole = place.read_text()
    place.write_text(whole.replace("0.25", "0.75"))
    training.RunFolder.reopen(tmp_path / "run", config).close()
    assert "config.json is damaged: its copy is taken" in capsys.readouterr().err
    assert place.read_text() == whole
    other = {**config, "data_sha256": ["a" * 64, "c" * 64]}
    with pytest.raises(UserError, match=r"config \(data-sha256: others here\); resume"):
        training.RunFolder.reopen(tmp_path / "run", other)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]"])
def test_an_environment_that_cannot_be_read_is_told_as_that(tmp_path, capsys, content):
    training.RunFolder.create(tmp_path / "run", {}).close()
    place = tmp_path / "run" / "environment.json"
    place.unlink() if content is None else place.write_bytes(content)
    training.RunFolder.reopen(tmp_path / "run", {}).close()
    assert "environment.json cannot be read: on other devices" in capsys.readouterr().err
    training.RunFolder.reopen(tmp_path / "run", {}).close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [".lock", ".metrics.jsonl.tmp", ".config.json.tmp"])
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_through_a_link(tmp_path, name, there):
    """What it points to, outside the folder, stays as it is."""
    victim, folder = tmp_path / "victim", tmp_path / "run"
    training.RunFolder.create(folder, {"epochs": 1}).close()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    if there:
        victim.write_text("precious")
    if name == ".lock":
        with pytest.raises(UserError, match=r"\.lock is a folder or a link: delete it"):
            training.RunFolder.reopen(folder, {"epochs": 2})
    else:
        with training.RunFolder.reopen(folder, {"epochs": 2}) as run:
            run.rewind(0, ())
            assert run.config() == {"epochs": 2}
    assert victim.exists() == there
    assert not there or victim.read_text() == "precious"


def test_another_environment_is_announced(tmp_path, capsys):
    before = {"accelerator": "cpu (cpu)", "devices": 8}
    training.RunFolder.create(tmp_path / "run", {}, before).close()
    training.RunFolder.reopen(tmp_path / "run", {}, before).close()
    assert capsys.readouterr().err == ""
    training.RunFolder.reopen(tmp_path / "run", {}, {**before, "devices": 1}).close()
    said = capsys.readouterr().err
    assert "in another environment (devices: 8 there, 1 here): equal to rounding" in said


# -- bits that flip -------------------------------------------------------------------------------

FLIP = """
import contextlib, functools, io, json, pathlib, random, shutil, sys
from lstmjax.commands import imdb
from lstmjax.training.command import run_command
imdb.load_demo = functools.cache(imdb.load_demo)
whole, count, flags = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
chance, run = random.Random(0), pathlib.Path("run")
newest = max((whole / "checkpoints").iterdir(), key=lambda p: int(p.name)).name
for _ in range(count):
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    files = sorted(p for p in (run / "checkpoints" / newest).rglob("*") if p.is_file())
    file = chance.choices(files, [p.stat().st_size for p in files])[0]
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    sys.argv = ["imdb.py", *flags, "--run-dir", "run", "--resume"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        run_command(imdb.RECIPES, imdb.main, "")
    print("told" if "is damaged" in said.getvalue() else "sound", file=sys.__stderr__)
    result = json.loads((run / "result.json").read_text())
    print(result["test_loss"], [e["train_loss"] for e in result["epochs"]], file=sys.__stderr__)
"""


def test_flipped_bits_are_noticed(environment, whole, tmp_path):
    """Anywhere in the newest checkpoint: the result is the same, whether the bit counts or not."""
    count = 200 if LONG else 4
    done = subprocess.run(
        [sys.executable, "-c", FLIP, str(whole), str(count), *FLAGS],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [t for t in done.stderr.splitlines() if t in ("told", "sound") or t[0].isdigit()]
    result = json.loads((whole / "result.json").read_text())
    wanted = f"{result['test_loss']} {[e['train_loss'] for e in result['epochs']]}"
    assert lines[1::2] == count * [wanted]
    assert "told" in lines[::2]
    told = lines.count("told")
    how = f"random bits; {told} were noticed, the others changed no value"
    words = "checkpoint ... is damaged: ... has another checksum; that before is taken"
    tell("one bit of the newest checkpoint flipped", how, count, words)
