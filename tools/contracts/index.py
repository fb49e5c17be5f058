"""Files of a release on the package index, read by ranges of its wheel: kilobytes out of hundreds of megabytes.

pip is the client: which index, with which certificates and through which proxy is its configuration, and its own reader
of remote wheels fetches the zip's directory and then the members asked for. Both are internals of pip, so this is the
only file that imports it. Seen to work with pip 23.2 and 26.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pip._internal.commands import create_command
from pip._internal.network.lazy_wheel import LazyZipOverHTTP
from pip._vendor.packaging.version import Version

from tools.contracts.wheel import CHUNK, Wheel


class Index:
    """The releases of one project that have a wheel for this machine; their Python files are the same for all."""

    def __init__(self, project: str) -> None:
        self.project = project
        command = create_command("index")
        options, _ = command.parse_args(["--quiet"])
        self._session = command._build_session(options)
        finder = command._build_package_finder(options, self._session, ignore_requires_python=True)
        self._links = {each.version: each.link for each in finder.find_all_candidates(project) if each.link.is_wheel}

    def versions(self, oldest: str) -> list[str]:
        """Final and post releases from `oldest` on, in order."""
        return [str(each) for each in sorted(self._links) if each >= Version(oldest) and not each.is_prerelease]

    @contextmanager
    def wheel(self, version: str) -> Iterator[Wheel]:
        with LazyZipOverHTTP(self._links[Version(version)].url, self._session, CHUNK) as remote:
            yield Wheel(remote)
