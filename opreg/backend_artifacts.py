"""What Inductor's cache holds is checked before it runs: a damaged file is removed, and the piece compiled again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger("opreg")


@contextmanager
def artifacts_checked() -> Iterator[None]:
    """Inside, an entry of Inductor's index and a generated module are loaded only if they are what their names, hashes
    of them, say. A flipped byte may leave an entry readable that computes something else."""
    from torch._inductor.codecache import FxGraphCache, PyCodeCache, code_hash, sha256_hash

    load_module = PyCodeCache.load_by_key_path
    entries = FxGraphCache.iterate_over_candidates
    own = vars(FxGraphCache).get("iterate_over_candidates")

    def load(key: str, path: str, *args: Any, **kwargs: Any) -> Any:
        if code_hash(Path(path).read_bytes().decode(errors="replace").strip()) != key:
            _remove(Path(path), "its piece is compiled again")
            # Inductor takes a missing file as a miss of its cache.
            raise FileNotFoundError(path)
        return load_module(key, path, *args, **kwargs)

    def checked(local: bool, remote_cache: Any, key: str) -> Iterator[Any]:
        folder = Path(FxGraphCache._get_tmp_dir_for_key(key))
        for path in folder.iterdir() if local and folder.exists() else ():
            # Names that begin with a dot are of files that another process is writing.
            if not path.name.startswith(".") and sha256_hash(path.read_bytes()) != path.name:
                _remove(path, "its piece is compiled again")
        return entries(local, remote_cache, key)

    PyCodeCache.load_by_key_path = load  # type: ignore[method-assign]
    FxGraphCache.iterate_over_candidates = checked  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        PyCodeCache.load_by_key_path = load_module  # type: ignore[method-assign]
        if own is None:  # it is inherited
            del FxGraphCache.iterate_over_candidates
        else:
            FxGraphCache.iterate_over_candidates = own  # type: ignore[method-assign]


def _remove(path: Path, so: str) -> None:
    path.unlink(missing_ok=True)
    log.warning("%s is damaged; %s", path, so)


def unwritable_cache() -> str:
    """Why nothing can be written where Inductor keeps what it compiles, with the folder's name; '' where it can."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    try:
        folder = cache_dir()  # makes it, too
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} ({type(error).__name__}: {error.strerror})"


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
            _remove(path, "it is built again")

    def keep(self, path: str) -> None:
        """Note what was built."""
        if not self.facts.exists():
            from torch._inductor.codecache import write_atomic

            known = {"path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
            write_atomic(str(self.facts), json.dumps(known), make_dirs=True)
