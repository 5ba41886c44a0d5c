"""What Inductor's cache holds is checked before it runs: a damaged file is removed, and the piece compiled again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger("opreg")


@contextmanager
def modules_checked() -> Iterator[None]:
    """Inside, a generated module is loaded only if it is the one that its name, a hash of it, says."""
    from torch._inductor.codecache import PyCodeCache, code_hash

    original = PyCodeCache.load_by_key_path

    def load(key: str, path: str, *args: Any, **kwargs: Any) -> Any:
        if code_hash(Path(path).read_bytes().decode(errors="replace").strip()) != key:
            Path(path).unlink()
            log.warning("%s is damaged; its piece is compiled again", path)
            # Inductor takes a missing file as a miss of its cache.
            raise FileNotFoundError(path)
        return original(key, path, *args, **kwargs)

    PyCodeCache.load_by_key_path = load  # type: ignore[method-assign]
    try:
        yield
    finally:
        PyCodeCache.load_by_key_path = original  # type: ignore[method-assign]


class Library:
    """A compiled library: where it is and what its bytes are is kept in a file named by its source."""

    def __init__(self, source: str) -> None:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        self.facts = Path(cache_dir()) / "opreg" / f"{hashlib.sha256(source.encode()).hexdigest()}.json"

    def check(self) -> None:
        """Remove the library if it is not what was built, so that it is built again."""
        try:
            known = json.loads(self.facts.read_text())
            path, digest = Path(known["path"]), known["sha256"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            self.facts.unlink()
            return
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            path.unlink()
            log.warning("%s is damaged and built again", path)

    def keep(self, path: str) -> None:
        """Note what was built."""
        if not self.facts.exists():
            from torch._inductor.codecache import write_atomic

            known = {"path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
            write_atomic(str(self.facts), json.dumps(known), make_dirs=True)
