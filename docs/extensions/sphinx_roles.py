"""Griffe extension: cross-reference roles of the docstrings (``:class:`~package.Name```) become links.

The docstrings use Sphinx roles, which mkdocstrings would show as they are.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(?P<short>~?)(?P<target>[\w.]+)`")


class SphinxRoles(griffe.Extension):
    """Rewrites each role to code, linked where the object that it names is on some page."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite all docstrings once the whole package is known, so that names can be resolved."""
        _rewrite(pkg)


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring is not None:
        obj.docstring.value = _ROLE.sub(lambda role: _link(role["target"], role["short"], obj), obj.docstring.value)
    for member in obj.members.values():
        if isinstance(member, griffe.Object):  # the others are imports; their homes are visited by themselves
            _rewrite(member)


def _link(target: str, short: str, obj: griffe.Object) -> str:
    shown = target.rpartition(".")[2] if short else target
    head, dot, rest = target.partition(".")
    try:
        path = obj.resolve(head) + dot + rest
    except griffe.NameResolutionError:
        path = target
    # Optional: names of other projects, and objects that no page shows, stay plain code.
    return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'
