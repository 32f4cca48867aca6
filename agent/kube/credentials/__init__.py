"""Which objects hold the credentials of a cache, and what they come to (kserve.md 5.2, 9.1.10-12).

Nothing is read here. `needs` says which objects must be read next, each by its exact name, until
it says none; `resolve` then answers from what was read. Both walk the same rules (`_steps`), so
what is used and what is asked for cannot differ:

    asked = ask(entry, config_namespace="kserve")
    while wanted := needs(asked, objects):
        objects |= {need: <the object, or None if there is none> for need in wanted}
    credentials = resolve(asked, objects)

The result is what KServe's download container would have had: an environment, a few files, a CA
bundle. A value that came from a Secret is in no message, no `repr`, and no exception behind one (a
decoder's error holds the text it failed at, so nothing is raised while one is handled). Whatever is
wrong with an object is `Unauthorized`, which is tried again: somebody may create or mend it (issue
6). The same object can be read for many caches; nothing is kept here.
"""

from agent.kube.credentials.config import CONFIG_MAP, DEFAULT_JOB_NAMESPACE
from agent.kube.credentials.container import PATTERNS
from agent.kube.credentials.nouns import Ask, Credentials, Kind, Need, WebIdentity
from agent.kube.credentials.patterns import Patterns, storage_patterns
from agent.kube.credentials.walk import ask, needs, resolve

__all__ = [
    "CONFIG_MAP",
    "DEFAULT_JOB_NAMESPACE",
    "PATTERNS",
    "Ask",
    "Credentials",
    "Kind",
    "Need",
    "Patterns",
    "WebIdentity",
    "ask",
    "needs",
    "resolve",
    "storage_patterns",
]
