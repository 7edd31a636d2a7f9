"""What was run: fresh, stale (and why), running, unfinished or damaged."""

import json
from pathlib import Path

from filelock import FileLock

from lddyn.engine import cache, store


def status(root: Path | None = None) -> list[dict]:
    """One entry for each run folder: `run, state, why, parameters, seconds, finished`.

    The state is `fresh`, `stale` (why names what changed), `running`, `unfinished` or `damaged`.
    """
    entries = []
    for path in sorted((root or store.runs_root()).glob("*/manifest.json")):
        entry = {"run": path.parent.name, "state": "fresh", "why": "", "parameters": {}}
        try:
            manifest = json.loads(path.read_text())
            entry |= {k: manifest.get(k) for k in ("parameters", "seconds", "finished")}
            changed = cache.stale_because(manifest)
            if changed:
                entry |= {"state": "stale", "why": ", ".join(changed)}
            elif not manifest["finished"]:
                running = _is_locked(path.parent)
                entry |= {
                    "state": "running" if running else "unfinished",
                    "why": f"since {manifest['started']}",
                }
            elif store.file_hash(path.parent / "table.parquet") != manifest["table_sha256"]:
                entry |= {"state": "damaged", "why": "table.parquet differs from the manifest's hash"}
        except (OSError, ValueError, KeyError) as error:
            entry |= {"state": "damaged", "why": f"{type(error).__name__}: {error}"}
        entries.append(entry)
    return entries


def _is_locked(folder: Path) -> bool:
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except (TimeoutError, OSError):
        return True
    lock.release()
    return False
