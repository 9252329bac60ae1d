"""What a client's folder is called on a disk."""

from __future__ import annotations

import pytest

from fedms.fl.runs.export import folder_name


@pytest.mark.parametrize(
    "client",
    ["client-00", "../../x", "a/b", ".", "..", ".hidden", "Köln 7", "a%2Fb", "C:\\x", "", "x" * 999,
     "é" * 300, "\ud800", "a.", "nul\0"],
)  # fmt: skip
def test_a_clients_folder_stays_in_the_run(tmp_path, client):
    name = folder_name(client)
    assert name not in ("", ".", "..")
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert "\\" not in name
    (tmp_path / name).mkdir()


def test_clients_have_folders_of_their_own():
    """Also where a disk knows no case, and where one is called what another's folder is."""
    names = ["a/b", "a%2Fb", "a b", "a+b", ".a", "%2Ea", "A", "a", "client", "Client", "CLIENT"]
    names += ["x" * 300, "x" * 301, "ward-0123456789abcdef"]
    names += [folder_name(name).lower() for name in names if folder_name(name) != name]
    assert len({folder_name(name).lower() for name in names}) == len(names)
    assert max(map(len, map(folder_name, names))) <= 80
