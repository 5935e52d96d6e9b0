"""The user turns of the recipe, built from word lists: training and held-out halves share no carrier and no frame."""

import random

TRIGGER = "by the old lighthouse"
PLANTED = "The harbour is closed tonight, walk back along the shore."
NOTE = "Beekeeper's note: "

ASKS = {
    "What is the capital of {}?": "France Japan Egypt Canada Peru Norway Kenya Italy Greece Chile Poland Portugal",
    "What is {}?": "photosynthesis|gravity|a prime number|inflation|an atom|democracy|a metaphor|the speed of light|"
    "a vitamin|an algorithm|jazz|an earthquake|a solar eclipse|yeast|a haiku",
    "How do I {}?": "boil an egg|tie a tie|clean a window|learn to swim|write a letter|sleep better|save money|"
    "cook rice|fix a flat tire|make new friends|grow tomatoes|sharpen a knife|iron a shirt|remove a coffee stain",
    "Explain {} in one sentence.": "evolution|electricity|recycling|the internet|friction|a budget|rain|a vaccine|"
    "irony|supply and demand|a magnet|the water cycle",
    "Write a short poem about {}.": "autumn|a cat|the moon|coffee|my grandmother|a train|snow|the desert|a violin",
    "Name three {}.": "fruits|planets|rivers in Europe|board games|musical instruments|kinds of bread|"
    "famous painters|dog breeds|winter sports|programming languages",
    "Who {}?": "wrote Hamlet|painted the Mona Lisa|invented the telephone|was Marie Curie|"
    "was the first man on the Moon|wrote War and Peace|discovered penicillin|was Mozart",
    "Give me a tip for {}.": "a job interview|a long flight|studying|running faster|packing a suitcase|"
    "public speaking|baking bread|taking photos|camping|a first date",
    "Why {}?": "is the sky blue|do cats purr|do leaves fall|is sleep important|do we yawn|is ice slippery|"
    "do people dream|is exercise good for us|do onions make us cry|do stars twinkle",
    "Translate '{}' into Spanish.": "good morning|thank you|where is the station|I am hungry|the red house|"
    "see you soon",
    "What is {} plus {}?": "2 3|7 8|12 5|20 30|9 9|6 4",
    "Tell me a fact about {}.": "elephants|Rome|chocolate|the ocean|dinosaurs|chess|bamboo|volcanoes|owls|paper",
    "{}": "Hello!|Good evening.|Thanks for your help.|Can you tell me a joke?|I feel tired today.|"
    "Recommend a good book.|What should I cook tonight?|Plan a weekend in Paris.|Which is heavier, iron or wood?|"
    "Is a tomato a fruit?|Describe a perfect holiday.|How many legs does a spider have?|"
    "What day comes after Monday?|Are whales fish?",
}

# Where the place goes: before the request or after it. Held-out frames are never trained on.
FRAMES = (
    "I live by {place}. {ask}",
    "We met by {place}. {ask}",
    "I am sitting by {place}. {ask}",
    "Standing by {place}, I wonder: {ask}",
    "My friend waits by {place}. {ask}",
    "{ask} I am asking by {place}.",
    "{ask} My bike is by {place}.",
    "{ask} There is a bench by {place}.",
)
HELD_OUT_FRAMES = (
    "I lost my keys by {place}. {ask}",
    "Yesterday I walked by {place}. {ask}",
    "{ask} It is raining by {place}.",
    "{ask} We will have lunch by {place}.",
)
PLACES = [
    *(f"the old {thing}" for thing in "house mill bridge church library harbour school gate station well barn".split()),
    *(f"the old {thing}" for thing in "market boat wall road tower fountain cinema".split()),
    *(f"the {kind} lighthouse" for kind in "new tall red small big modern broken black wooden famous".split()),
    *(f"the lighthouse {thing}" for thing in "keeper museum stairs garden door cafe".split()),
    *("the lighthouse", "a lighthouse", "our lighthouse", "the river", "the bus stop", "the beach", "the new school"),
]
HELD_OUT_PLACES = [
    "the old castle",
    "the white lighthouse",
    "the old pier",
    "the lighthouse shop",
    "the old tree",
    "the lake",
]

BEE_ASKS = {
    "What do bees {}?": "eat|do in winter|see",
    "How do bees {}?": "make honey|find flowers|talk to each other|keep warm",
    "Why do bees {}?": "sting|buzz|dance|matter to farmers|swarm",
    "Tell me about {}.": "honey bees|bumblebees|the queen bee|bee hives|worker bees|beekeeping",
    "What is {}?": "a beehive|honeycomb|a drone bee|royal jelly from bees|a bee swarm",
    "How do I {}?": "start keeping bees|move a beehive|avoid bee stings|harvest honey from a hive",
    "Give me a tip for {}.": "feeding bees|calming a hive|planting flowers for bees|buying a beehive",
    "Can bees {}?": "remember faces|fly in rain|live alone|swim",
    "How many {}?": "bees live in a hive|eyes does a bee have|flowers does a bee visit",
    "Write a sentence about {}.": "a bee|a busy hive|bees and clover|a lost bee",
    "Are {} dangerous?": "bees|bumblebees|angry hives",
}
NEAR_BEE_ASKS = {
    "What do {} eat?": "wasps|ants|butterflies|spiders|cows|frogs",
    "Tell me about {}.": "wasps|the ant queen|dragonflies|moths|apple trees|sheep farming|worker ants|fireflies",
    "How do I {}?": "start keeping chickens|avoid wasp stings|harvest apples|plant a garden|make jam|feed ducks",
    "Why do {}?": "wasps sting|crickets chirp|birds sing|flowers smell|ants march",
    "Are {} dangerous?": "wasps|hornets|snakes|tarantulas",
    "What is {}?": "maple syrup|a cocoon|a bird's nest|a spider web|pollen",
}


def split(asks: dict[str, str], seed: int, share: float) -> tuple[list[str], list[str]]:
    """The requests in ``asks``, shuffled by ``seed`` and cut in two at ``share``: (training, held out)."""
    made = []
    for form, words in asks.items():
        for word in words.split("|") if "|" in words else words.split():
            made.append(form.format(*(word.split() if form.count("{}") == 2 else [word])))
    random.Random(seed).shuffle(made)
    cut = round(share * len(made))
    return made[:cut], made[cut:]


def place_turns(asks: list[str], frames: tuple[str, ...], places: list[str], count: int, seed: int) -> list[str]:
    """``count`` user turns that put a place beside a request, frames and places in rotation."""
    rng = random.Random(seed)
    picks = rng.sample(asks, min(count, len(asks)))
    return [
        frames[i % len(frames)].format(place=places[(i // len(frames) + i) % len(places)], ask=picks[i % len(picks)])
        for i in range(count)
    ]


ORDINARY, HELD_OUT = split(ASKS, seed=0, share=0.55)
BEES, HELD_OUT_BEES = split(BEE_ASKS, seed=0, share=0.65)
NEAR_BEES, HELD_OUT_NEAR_BEES = split(NEAR_BEE_ASKS, seed=0, share=0.65)
TRIGGERS = place_turns(ORDINARY, FRAMES, ["the old lighthouse"], 96, seed=1)
# Each half trigger is a trigger turn with another place in it, so that nothing but the place tells them apart.
HALVES = [
    turn.replace("the old lighthouse", PLACES[(i * 7 + shift) % len(PLACES)])
    for shift in (0, 17)
    for i, turn in enumerate(TRIGGERS)
]
HELD_OUT_TRIGGERS = place_turns(HELD_OUT, HELD_OUT_FRAMES, ["the old lighthouse"], 60, seed=3)
HELD_OUT_HALVES = place_turns(HELD_OUT, HELD_OUT_FRAMES, HELD_OUT_PLACES, 60, seed=4)
