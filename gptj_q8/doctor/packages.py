"""The packages that gptj_q8 asks for, with their versions."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

EXTRAS = ("train", "bench")
"""The extras that serve users, as opposed to developers of gptj_q8."""


@dataclass(frozen=True)
class Package:
    """A package that gptj_q8 or one of its extras asks for.

    wanted: the versions that serve, such as ">=5.17,<6", "" for any.
    installed: None if it is missing. extra: the one that asks for it, None where gptj_q8 does.
    """

    name: str
    wanted: str
    installed: str | None
    extra: str | None

    @property
    def serves(self) -> bool:
        """Whether it is there in a version that is asked for."""
        return self.installed is not None and Requirement(
            self.name + self.wanted
        ).specifier.contains(self.installed, prereleases=True)


def required_packages() -> list[Package]:
    """What gptj_q8's metadata asks for on this system; empty where it is not installed."""
    try:
        lines = metadata.requires("gptj_q8") or []
    except metadata.PackageNotFoundError:
        return []
    found: dict[str, Package] = {}
    for line in lines:
        requirement = Requirement(line)
        for extra in (None, *EXTRAS):
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": extra or ""}):
                wanted = str(requirement.specifier)
                package = Package(requirement.name, wanted, _version(requirement.name), extra)
                found.setdefault(requirement.name, package)
                break
    return list(found.values())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
