"""File and batch objects in SQLite: a JSON document each, on the disk when a method returns."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deployments.batches.client import Page

Document = dict[str, Any]

_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, owner TEXT, purpose TEXT, document TEXT);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, owner TEXT, purpose TEXT, document TEXT);
"""
FILES, BATCHES = "files", "batches"


class Database:
    """The objects of one server. For one thread: every method blocks, and raises sqlite3.Error if it cannot be done.

    Args:
        path: of the database; made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        # The folder may be on a network file system, where a write-ahead log does not work.
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level="IMMEDIATE")
        self._connection.execute("PRAGMA journal_mode = DELETE")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.executescript(_TABLES)

    def add(self, table: str, owner: str, document: Document) -> None:
        """Add an object; see `write`."""
        self.write([(table, owner, document)])

    def write(self, objects: list[tuple[str, str, Document]]) -> None:
        """Add objects, or replace those that there are: all or none.

        Args:
            objects: the table, the owner and the document of each.
        """
        with self._connection:
            for table, owner, document in objects:
                self._connection.execute(
                    f"INSERT INTO {table} (id, owner, purpose, document) VALUES (?, ?, ?, ?) "
                    "ON CONFLICT (id) DO UPDATE SET document = excluded.document",
                    (document["id"], owner, document.get("purpose", ""), json.dumps(document)),
                )

    def get(self, table: str, object_id: str, owner: str) -> Document | None:
        """The object of an owner; None if there is none."""
        query = f"SELECT document FROM {table} WHERE id = ? AND owner = ?"
        found = self._connection.execute(query, (object_id, owner)).fetchone()
        return None if found is None else dict(json.loads(found[0]))

    def page(self, table: str, owner: str, page: Page) -> tuple[list[Document], bool]:
        """Objects of an owner, and whether there are more."""
        beyond, order = ("<", "DESC") if page.newest_first else (">", "ASC")
        query, values = f"SELECT document FROM {table} WHERE owner = ?", [owner]
        if page.purpose is not None:
            query, values = f"{query} AND purpose = ?", [*values, page.purpose]
        if page.after is not None:
            query += f" AND number {beyond} (SELECT number FROM {table} WHERE id = ? AND owner = ?)"
            values = [*values, page.after, owner]
        found = self._connection.execute(f"{query} ORDER BY number {order} LIMIT ?", (*values, page.limit + 1))
        documents = [dict(json.loads(text)) for (text,) in found]
        return documents[: page.limit], len(documents) > page.limit

    def all(self, table: str) -> Iterator[tuple[str, Document]]:
        """The owner and the document of every object, the oldest first."""
        for owner, text in self._connection.execute(f"SELECT owner, document FROM {table} ORDER BY number").fetchall():
            yield owner, dict(json.loads(text))

    def remove(self, table: str, object_id: str) -> None:
        """Remove an object."""
        with self._connection:
            self._connection.execute(f"DELETE FROM {table} WHERE id = ?", (object_id,))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
