"""Stand-ins for the outside worlds, each held to its original by a suite in `tests/contracts`."""
