"""`make demo`: the whole story on one machine, in under two minutes, with nothing but Python.

A local hub stands in for huggingface.co (the real `huggingface_hub` client talks to it), a real
safetensors model is made and cached by the real agent. Everything stays below `.demo/`.
"""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(".demo")
URI = "hf://demo/tiny-llama"
LOCALMODEL = str(Path(sys.executable).with_name("localmodel"))

_CACHE = f"""\
apiVersion: serving.kserve.io/v1alpha1
kind: LocalModelCache
metadata:
  name: tiny-llama
spec:
  sourceModelUri: {URI}
  modelSize: 1Gi
  nodeGroups: [gpu]
"""

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 8,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    begun = time.monotonic()
    for name in ("cache", "desired", "hub", "upstream"):  # and not what its user put beside them
        shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / "desired").mkdir(parents=True)
    with ExitStack() as stack:
        say("1. A hub on this machine, with a safetensors model of two shards")
        make_model(HERE / "upstream")
        endpoint = stack.enter_context(hub())
        print(f"   {endpoint} serves {URI}")

        say("2. The agent, told by a directory of LocalModelCache YAML what this node should hold")
        stack.enter_context(agent(endpoint))
        (HERE / "desired" / "tiny-llama.yaml").write_text(_CACHE)
        print(_indented(_CACHE))
        follow_status()

        say("3. Ask for it: it is here already, so nothing is downloaded")
        localmodel("pull", URI)
        localmodel("ls")

        say("4. One byte on the disk goes bad: `verify` finds the file, and mends only that one")
        corrupt_one_byte()
        localmodel("verify", "--all", "--repair")
        localmodel("verify", "--all")

        say("5. The manifest needs no tool of ours: coreutils agree")
        check_with_coreutils()
    say(f"Done in {time.monotonic() - begun:.0f} s. The cache stays in {HERE}/cache; type next:")
    bin_ = os.path.relpath(LOCALMODEL)
    print(f"""\
   {bin_} ls --root {HERE}/cache
   {bin_} show {URI} --root {HERE}/cache
   {bin_} verify --all --root {HERE}/cache

   With a real model from huggingface.co (set HF_TOKEN for a gated one):
   {bin_} pull hf://Qwen/Qwen2.5-0.5B-Instruct --exclude '*.bin' --root {HERE}/real

   The agent with a real model: name it in the YAML, then look at what it says:
   sed -i 's#{URI}#hf://Qwen/Qwen2.5-0.5B-Instruct#' {HERE}/desired/tiny-llama.yaml
   {bin_} agent --desired {HERE}/desired --root {HERE}/real &
   cat {HERE}/desired/status/tiny-llama.json
   curl -s http://127.0.0.1:9810/metrics | grep ^localmodel_""")


def say(text: str) -> None:
    bold = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"\n\033[1m{text}\033[0m" if bold else f"\n{text}", flush=True)


def localmodel(*arguments: str) -> None:
    """Run one verb on the demo's cache, showing the command line as a user would type it."""
    print(f"   $ localmodel {' '.join(arguments)} --root {HERE}/cache", flush=True)
    found = subprocess.run(
        [LOCALMODEL, *arguments, "--root", str(HERE / "cache")],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(_indented(found.stdout), flush=True)


def make_model(root: Path) -> None:
    """Two safetensors shards with their index, as a hub has them; valid for any reader."""
    root.mkdir()
    weight_map: dict[str, str] = {}
    dice = random.Random(0)
    for shard in (1, 2):
        name = f"model-0000{shard}-of-00002.safetensors"
        tensors = {
            f"model.layers.{layer}.mlp.up_proj.weight": (2048, 8192)
            for layer in range(4 * (shard - 1), 4 * shard)
        }
        write_safetensors(root / name, tensors, dice)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (root / "config.json").write_text(json.dumps(_CONFIG, indent=1))


def write_safetensors(path: Path, tensors: dict[str, tuple[int, int]], dice: random.Random) -> None:
    """The format: length of the header, header, data. BF16 numbers, random."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (rows, columns) in tensors.items():
        size = rows * columns * 2
        offsets = [end, end + size]
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": offsets}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(0, end, 1 << 20):
            file.write(dice.randbytes(1 << 20))


@contextmanager
def hub() -> Iterator[str]:
    """Our hub as a process of its own; its endpoint."""
    command = [sys.executable, "-m", "tests.fakes.hub", "--root", str(HERE / "hub"), "--port", "0"]
    with process([*command, "--add", f"demo/tiny-llama={HERE / 'upstream'}"], {}) as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        if "http://" not in line:
            sys.exit("error: the demo's hub did not start")
        yield line.split()[-1]


@contextmanager
def agent(endpoint: str) -> Iterator[None]:
    """The agent, capped so that there is something to watch."""
    arguments = ["--desired", f"{HERE}/desired", "--root", f"{HERE}/cache"]
    print(f"   $ localmodel agent {' '.join(arguments)} --max-rate 60Mi &")
    command = [LOCALMODEL, "agent", *arguments, "--max-rate", "60Mi", "--listen", "127.0.0.1:0"]
    with (HERE / "agent.log").open("w") as log, process(command, {"HF_ENDPOINT": endpoint}, log):
        yield


@contextmanager
def process(
    command: Sequence[str], environment: dict[str, str], errors: object = None
) -> Iterator["subprocess.Popen[str]"]:
    running = subprocess.Popen(
        command,
        env={**os.environ, **environment, "NO_PROXY": "127.0.0.1,localhost"},
        stdout=subprocess.PIPE,
        stderr=errors,  # type: ignore[call-overload]
        text=True,
    )
    try:
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(15)


def follow_status() -> None:
    """The status file that the agent keeps beside the YAML, until the model is on offer."""
    path = HERE / "desired" / "status" / "tiny-llama.json"
    print(f"   $ watch cat {path}")
    live = sys.stdout.isatty()
    deadline, shown = time.monotonic() + 60, ""
    while time.monotonic() < deadline:
        time.sleep(0.2)
        try:
            status = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        done, total = status["downloadedBytes"], status["bytes"]
        filled = 30 * done // total if total else 0
        line = (
            f"   {status['modelStatus']:<20} [{'#' * filled:<30}]"
            f" {done / 2**20:5.0f} of {total / 2**20:.0f} MiB"
        )
        if line != shown:
            print(f"\r{line}" if live else line, end="" if live else "\n", flush=True)
            shown = line
        if status["modelStatus"] == "ModelDownloaded":
            print("\n" if live else "", end="")
            print(_indented(json.dumps(status, indent=1)))
            return
    sys.exit(f"error: the model did not arrive; see {HERE}/agent.log")


def corrupt_one_byte() -> None:
    path = next((HERE / "cache" / "models").glob("*/model-00001-of-00002.safetensors"))
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))
    path.chmod(0o444)
    print(f"   flipped one bit of {path}")


def check_with_coreutils() -> None:
    manifest = next((HERE / "cache" / ".localmodel" / "manifests").iterdir()).resolve()
    model = next((HERE / "cache" / "models").iterdir())
    print(f"   $ cd {model} && sha256sum -c ../../.localmodel/manifests/{manifest.name}")
    found = subprocess.run(
        ["sha256sum", "-c", str(manifest)],
        cwd=model,
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(_indented(found.stdout), end="")


def _indented(text: str) -> str:
    return "".join(f"   {line}\n" for line in text.splitlines())


if __name__ == "__main__":
    main()
