"""Write the pages of docs/ that are tables of the code: `make docs`; `--check` only compares.

states.md     phases.TRANSITIONS, drawn
reasons.md    errors.RULES
metrics.md    metrics.Metrics
settings.md   config.Settings
cli.md        the parser of cli.command
hook.md       hook.decisions.EXPLAINED, between two lines of a page that people write
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from math import isinf
from pathlib import Path

from agent.cli.command import parser
from agent.config import ControllerSettings, Settings, variable_of
from agent.errors import RULES
from agent.hook.decisions import EXPLAINED, QUIET
from agent.metrics import HookMetrics, Metrics
from agent.model import Space, Traffic
from agent.phases import MEANING, TRANSITIONS, Phase
from agent.status import KSERVE_STATUS, WAITS
from agent.words import SAYS

DOCS = Path(__file__).parent
_NOTE = "<!-- Generated from {source} by `make docs`; a test compares. Do not edit. -->\n"


def states() -> str:
    lines = [_NOTE.format(source="agent/phases.py"), "# States of a model\n"]
    lines.append("A state is derived from facts and stored nowhere: files on disk, running jobs,")
    lines.append("recorded failures. `localmodel ls` shows it, `localmodel_models` counts it.\n")
    lines.append(_table(("State", "Means", "KServe reads"), _states()))
    lines.append("\n## Legal changes\n\nEvery other change is counted as")
    lines.append(
        "`localmodel_illegal_transitions_total` and is a bug.\n\n```mermaid\nstateDiagram-v2"
    )
    lines.append("    [*] --> Pending\n    [*] --> Ready\n    [*] --> Partial")
    for phase, targets in TRANSITIONS.items():
        lines += [f"    {phase} --> {target}" for target in Phase if target in targets]
    return "\n".join([*lines, "```\n"])


def _states() -> Iterator[tuple[str, str, str]]:
    for phase in Phase:
        yield f"`{phase}`", MEANING[phase], f"`{KSERVE_STATUS[phase]}`"


def reasons() -> str:
    head = [_NOTE.format(source="agent/errors.py"), "# Reasons\n"]
    head.append("Why something failed: in status, Events, logs, metrics and on the command line.")
    head.append("Times are between two tries of a model: the first doubles up to the last, each is")
    head.append("shortened at random to no less than half, and a `Retry-After` of up to an hour is")
    head.append("waited for. Where the reason heals by itself, KServe reads `ModelDownloading`.\n")
    rows = []
    for reason, rule in RULES.items():
        first, cap = rule.first_seconds, rule.cap_seconds
        again = "not by itself" if isinf(first) else f"{_span(first)} to {_span(cap)}"
        rows.append((f"`{reason}`", str(rule.tries), again, rule.advice))
    columns = ("Reason", "Tries of a file", "Then again after", "What to do")
    waits = _table(("Reason", "Means"), ((f"`{why}`", means) for why, means in WAITS.items()))
    title = "\n## Why a wanted model waits\n\nNothing has failed; the status says so, too.\n"
    said = _table(("Reason", "Means"), ((f"`{said}`", means) for said, means in SAYS.items()))
    pods = "\n## Events on pods\n\nWhere a model cannot come, the reason is one of those above.\n"
    return "\n".join([*head, _table(columns, rows), title, waits, pods, said])


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def metrics() -> str:
    head = [_NOTE.format(source="agent/metrics.py"), "# Metrics\n"]
    head.append("Labels are closed sets. Those of the agent, at `/metrics` of `--listen`:\n")
    found = Metrics()
    found.watch_disk(Path("/"), _no_space, lambda _: ("device", _TRAFFIC))
    title = "\n## Those of the controller\n\nAt `/metrics` of `--health-listen`:\n"
    return "\n".join([*head, _families(found), title, _families(HookMetrics())])


def _families(found: Metrics | HookMetrics) -> str:
    rows = []
    for family in sorted(found.registry.collect(), key=lambda family: family.name):
        suffix = "_total" if family.type == "counter" else ""
        name = f"`{family.name}{suffix}`"
        rows.append(
            (name, family.type, ", ".join(_labels(found, family.name)), family.documentation)
        )
    return _table(("Name", "Type", "Labels", "Meaning"), rows)


def _labels(found: Metrics | HookMetrics, name: str) -> list[str]:
    own: Mapping[str, object] = vars(found)
    for metric in own.values():
        if getattr(metric, "_name", None) == name:
            return [f"`{label}`" for label in getattr(metric, "_labelnames", ())]
    return ["`device`", "`direction`"] if name.startswith("localmodel_disk") else []


_TRAFFIC = Traffic(read_bytes=0, written_bytes=0, read_seconds=0.0, write_seconds=0.0)


def _no_space(_: Path) -> Space:
    return Space(capacity=1, free=1)


def settings() -> str:
    head = [_NOTE.format(source="agent/config.py"), "# Settings\n"]
    head.append("A flag wins over the variable, the variable over the default. Sizes are written")
    head.append("as Kubernetes does: `500Gi`, `1.5T`, `1048576`.\n")
    title = "\n## Those of the controller\n"
    return "\n".join([*head, _fields(Settings), title, _fields(ControllerSettings)])


def _fields(of: type[Settings] | type[ControllerSettings]) -> str:
    rows = []
    for setting in fields(of):
        flag = f"`--{setting.name.replace('_', '-')}`"
        variable = f"`{variable_of(setting)}`"
        default = "" if setting.default in (MISSING, None, ()) else f"`{setting.default}`"
        rows.append((flag, variable, default, setting.metadata["help"]))
    return _table(("Flag", "Variable", "Default", "Meaning"), rows)


def cli() -> str:
    head = [_NOTE.format(source="agent/cli/command.py"), "# Command line\n"]
    head.append("Exit codes: 0 it is so; 1 it is not (failed, or bad files were found); 2 the")
    head.append("request makes no sense. Errors go to stderr, with what to do about them; with")
    head.append("`-o json` to stdout as well, as an object. `NO_COLOR` is honoured.\n")
    lines = [*head]
    for name, command in _commands():
        lines.append(f"## localmodel {name}\n\n{command.description}\n")
        lines.append(_table(("Argument", "Meaning"), _arguments(command)))
    return "\n".join(lines)


def _commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _arguments(command: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """By hand, and not `format_help`: its layout changes from one Python to the next."""
    for action in command._actions:
        value = "/".join(action.choices or ()) or action.metavar or action.dest.upper()
        if not action.option_strings:
            yield f"`{value}`", action.help or ""
        elif "--help" not in action.option_strings:
            flags = ", ".join(action.option_strings)
            yield f"`{flags if action.nargs == 0 else f'{flags} {value}'}`", action.help or ""


def hook() -> str:
    """The page as it is, with the table of today. Raises ValueError without the lines around it."""
    head, begin, rest = _parted((DOCS / "hook.md").read_text(), "<!-- From agent/hook/decisions.py")
    note, _, rest = rest.partition("\n")
    _, end, tail = _parted(rest, "<!-- The end of what is generated.")
    rows = (
        (f"`{why}`", said.means, "quiet" if why in QUIET else "warned", said.advice)
        for why, said in EXPLAINED.items()
    )
    table = _table(("Value", "The pod is left as it is, because", "Told", "What to do"), rows)
    return f"{head}{begin}{note}\n\n{table}\n{end}{tail}"


def _parted(text: str, line: str) -> tuple[str, str, str]:
    place = text.index(line)
    return text[:place], line, text[place + len(line) :]


def _table(columns: tuple[str, ...], rows: object) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]  # type: ignore[attr-defined]
    return "\n".join(lines) + "\n"


PAGES: Mapping[str, Callable[[], str]] = {
    "states.md": states,
    "reasons.md": reasons,
    "metrics.md": metrics,
    "settings.md": settings,
    "cli.md": cli,
    "hook.md": hook,
}


def stale() -> list[str]:
    """The pages that are not what the code says now."""
    return [
        name
        for name, page in PAGES.items()
        if not (DOCS / name).exists() or (DOCS / name).read_text() != page()
    ]


def main() -> None:
    names = stale()
    if "--check" in sys.argv:
        if names:
            sys.exit(f"error: stale: {', '.join(names)}; run `make docs`")
        return
    for name in names:
        (DOCS / name).write_text(PAGES[name]())
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
