"""Runs in `.venvs/values`: pages as values of LMDB, RocksDB or SQLite, driven by lines of JSON, each timed here.

    python _peer_values.py lmdb|rocksdb|sqlite FOLDER PAGE_BYTES PAGES BATCH

Writes are synchronous, BATCH pages a commit, cyclic over PAGES keys; reads are of random keys into one buffer, after
the store was closed and the kernel's cache of its files dropped.
"""

import hashlib
import json
import os
import random
import sqlite3
import sys
import time
from pathlib import Path


class Lmdb:
    def __init__(self, folder, total):
        import lmdb

        self.env = lmdb.open(str(folder), map_size=4 * total + (1 << 30))

    def put(self, rows):
        with self.env.begin(write=True) as writing:
            for key, value in rows:
                writing.put(key, value)

    def get(self, key, target):
        with self.env.begin(buffers=True) as reading:
            target[:] = reading.get(key)

    def close(self):
        self.env.close()


class Rocksdb:
    def __init__(self, folder, total):
        import rocksdict

        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_enable_blob_files(True)
        options.set_min_blob_size(4096)
        options.set_enable_blob_gc(True)
        self.module, self.db = rocksdict, rocksdict.Rdict(str(folder / "db"), options)
        self.sync = rocksdict.WriteOptions()
        self.sync.sync = True

    def put(self, rows):
        batch = self.module.WriteBatch(raw_mode=True)
        for key, value in rows:
            batch.put(key, value)
        self.db.write(batch, self.sync)

    def get(self, key, target):
        target[:] = self.db[key]

    def close(self):
        self.db.close()


class Sqlite:
    def __init__(self, folder, total):
        self.db = sqlite3.connect(folder / "db", isolation_level=None)
        for pragma in ("page_size=65536", "journal_mode=WAL", "synchronous=FULL"):
            self.db.execute(f"pragma {pragma}")
        self.db.execute("create table if not exists pages (key blob primary key, value blob) without rowid")

    def put(self, rows):
        self.db.execute("begin")
        self.db.executemany("insert or replace into pages values (?, ?)", rows)
        self.db.execute("commit")

    def get(self, key, target):
        target[:] = self.db.execute("select value from pages where key = ?", (key,)).fetchone()[0]

    def close(self):
        self.db.close()


KINDS = {"lmdb": Lmdb, "rocksdb": Rocksdb, "sqlite": Sqlite}


def drop_cache(folder):
    """As if the machine had just started, for these files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main():
    kind, folder, page_bytes, pages, batch = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    folder.mkdir(parents=True, exist_ok=True)
    sources = [random.Random(n).randbytes(page_bytes) for n in range(batch)]
    keys = [hashlib.sha256(b"%d" % n).digest() for n in range(pages)]
    target = memoryview(bytearray(page_bytes))
    make = KINDS[kind]
    store, written = make(folder, pages * page_bytes), 0
    for line in sys.stdin:
        request = json.loads(line)
        answer = {}
        if request["do"] == "write":
            started = time.perf_counter()
            for _ in range(0, request["pages"], batch):
                store.put([(keys[(written + n) % pages], sources[n]) for n in range(batch)])
                written += batch
            answer["s"] = time.perf_counter() - started
        elif request["do"] == "read":
            store.close()
            drop_cache(folder)
            store = make(folder, pages * page_bytes)
            asked = random.sample(keys[: min(written, pages)], request["pages"])
            started = time.perf_counter()
            for key in asked:
                store.get(key, target)
            answer["s"] = time.perf_counter() - started
        print(json.dumps(answer), flush=True)
    store.close()


main()
