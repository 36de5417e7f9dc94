"""The demo model as a process of its own, as other tests start it."""

import openai

from tests.upstreams.demo import running_demo


def test_the_process_answers_to_the_names_given() -> None:
    with (
        running_demo(["one", "org/two"]) as upstream,
        openai.OpenAI(base_url=upstream.base_url, api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["one", "org/two"]
        assert "demo model" in client.responses.create(model="org/two", input="Hello").output_text
