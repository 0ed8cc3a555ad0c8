"""A part of llama.cpp's tests, if `make foreign` has fetched them: it runs all."""

import pytest
import server_tests
from conftest import forked_python


def test_a_part_of_the_tests_of_llama_cpp():
    if not server_tests.cached().exists():
        pytest.skip("llama.cpp's tests aren't in the cache; `make foreign` fetches and runs them")
    forked_python()  # for the servers
    assert server_tests.run(["-k", "test_chat_completion_stream or logprobs or invalid_chat"]) == 0
