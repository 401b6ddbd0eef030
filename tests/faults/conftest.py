"""One warm process per test session, and a sandbox per case."""

import pytest

pytest.register_assert_rewrite("harness")

from harness import Box, Server  # noqa: E402  (its asserts are rewritten first)


class _Servers(dict):
    def __missing__(self, torch):
        self[torch] = made = Server(torch)
        return made


@pytest.fixture(scope="session")
def servers():
    made = _Servers()
    yield made
    for server in made.values():
        server.close()


@pytest.fixture
def box(tmp_path, servers):
    return Box(tmp_path / "box", servers)
