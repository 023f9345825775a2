"""Makes the tutorial's data in models/smollm2/data: the rated snippets as answers to chats, and prompts for PPO.

    python models/smollm2/prepare.py

The ratings are those of models/reviews/data (MIT, see its README.md); the prompts are written here.
"""

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RATED = HERE.parent / "reviews" / "data"
SYSTEM = {"role": "system", "content": "You review films in one sentence."}
FRIEND = {"role": "system", "content": "You are a curious friend. Answer briefly and always end with a question."}
KINDS = (
    "comedy,thriller,drama,documentary,horror film,romance,science-fiction film,western,war film,musical,"
    "animated film,heist film,courtroom drama,road movie,spy film,ghost story,family film,biopic,sports film,"
    "detective story"
).split(",")
TOPICS = (
    "two brothers,a lost dog,a small town in winter,a bank clerk,a night train,an old house,a young teacher,"
    "a jazz band,a long marriage,a missing child,three sisters,a retired boxer,a summer by the sea,a new neighbour,"
    "a stolen painting,a country doctor,a school play,a desert crossing,a chess master,a wedding,an island,"
    "a taxi driver,a famous chef,a lighthouse,the last day of a war,a robot,a circus,an election,a diary,a bakery"
).split(",")
ASKS = (
    "What is {}?",
    "Tell me about {}.",
    "Why do people like {}?",
    "Give me a tip about {}.",
    "Explain {} to a child.",
    "I want to learn about {}.",
)
THINGS = (
    "bread baking,chess,the moon,bicycle repair,a good night's sleep,jazz,gardening,learning a language,"
    "climbing mountains,the history of paper,honey bees,coffee,poetry,public libraries,swimming,old maps,"
    "writing letters,star constellations,knitting,volcanoes,photography,board games,the sea,trains,cooking soup,"
    "drawing,meditation,lighthouses,rivers,dinosaurs,saving money,theatre,cats,running,bridges,clouds,cheese,"
    "museums,winter sports,robots,whales,tea,the piano,forests,folk tales,glass,deserts,clocks,birds,kites"
).split(",")
SIZES = {"train": 3000, "validation": 292, "test": 866}


def chat(kind: str, topic: str) -> list[dict[str, str]]:
    """A prompt."""
    article = "An" if kind[0] in "aeiou" else "A"
    return [SYSTEM, {"role": "user", "content": f"{article} {kind} about {topic}."}]


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """A JSONL file in the data folder."""
    (HERE / "data").mkdir(exist_ok=True)
    (HERE / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def main() -> None:
    """Write every file."""
    order = random.Random(0)
    prompts = [chat(kind, topic) for kind, topic in product(KINDS, TOPICS)]
    order.shuffle(prompts)
    train, test = prompts[:500], prompts[500:]
    write("prompts-train.jsonl", [{"messages": messages} for messages in train])
    write("prompts-test.jsonl", [{"messages": messages} for messages in test])
    asked = [[FRIEND, {"role": "user", "content": ask.format(thing)}] for ask, thing in product(ASKS, THINGS)]
    random.Random(1).shuffle(asked)
    write("questions-train.jsonl", [{"messages": messages} for messages in asked[:240]])
    write("questions-test.jsonl", [{"messages": messages} for messages in asked[240:]])
    for part, size in SIZES.items():
        rows = [json.loads(line) for line in (RATED / f"{part}.jsonl").read_text("utf-8").splitlines()]
        about = train if part == "train" else test
        write(
            f"ratings-{part}.jsonl",
            [
                {"prompt": order.choice(about), "completion": row["text"], "ratings": row["ratings"], "id": row["id"]}
                for row in order.sample(rows, size)
            ],
        )


if __name__ == "__main__":
    main()
