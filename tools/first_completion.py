#!/usr/bin/env python3
"""Wait until the lab's fast tier serves, ask it something, and show how to ask it more."""

from __future__ import annotations

import argparse
import sys
import time

import openai

MODEL = "smollm2-135m-instruct-q4_1"
PATIENCE_SECONDS = 300


def wait_until_served(client: openai.OpenAI) -> None:
    """Ask until the gateway answers for the tier, and tell what it says while it does not."""
    begin = time.monotonic()
    told = ""
    while True:
        try:
            client.models.list()
            return
        except openai.APIError as error:
            words = str(getattr(error, "message", error))
        waited = time.monotonic() - begin
        if waited > PATIENCE_SECONDS:
            sys.exit(f"no answer within {PATIENCE_SECONDS} s; the last one was: {words}")
        if words != told:
            print(f"  {waited:3.0f} s: {words}", flush=True)
            told = words
        time.sleep(1)


def answer_to(question: str, client: openai.OpenAI) -> str:
    """The model's answer; ends the program when it has none, since a tier that says nothing does not serve."""
    completion = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You are helpful."},
            {"role": "user", "content": question},
        ],
        max_tokens=40,
        temperature=0,
    )
    answer = completion.choices[0].message.content if completion.choices else ""
    if not (answer or "").strip():
        sys.exit(
            f"{MODEL} was asked {question!r} and answered {answer!r}, wanted some words. "
            "Look at router.log beside supervisor.log (README, How to look)."
        )
    return str(answer)


def main() -> None:
    """Print one completion, the URL, and a command to try next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lab", default="0", help="id of the lab")
    url = f"http://10.213.{parser.parse_args().lab}.10:8080/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)

    print(f"Waiting for the fast tier at {url}", flush=True)
    wait_until_served(client)
    question = "What is a GPU?"
    answer = answer_to(question, client)
    print(f"\n{MODEL} was asked: {question}\n{answer}\n")
    print(f"The endpoint is {url} (any OpenAI client; no key). Try next:\n")
    print(f"  curl -s {url}/chat/completions -H 'Content-Type: application/json' \\")
    print(f'    -d \'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n')
    print(f"The reasoning tier, one model over two nodes, is at {url.replace(':8080', ':8081')}.\n")


if __name__ == "__main__":
    main()
