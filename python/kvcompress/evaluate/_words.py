"""Words that the generators write with. Plain English, so that any tokenizer has short tokens for them."""

from __future__ import annotations

_NOUNS = """
river stone garden letter window mountain bottle candle market forest engine harbor pencil blanket hammer ladder mirror needle
orchard pocket rocket saddle tunnel valley wagon anchor basket carpet desert feather guitar helmet island jacket kettle lantern
magnet napkin ocean parcel quilt ribbon shovel temple umbrella village whistle barrel cabin drum eagle fountain glove hotel
jungle kitchen lemon meadow nest onion piano radio school table uncle violin winter bridge castle doctor farmer hunter sailor
teacher author baker carrier dancer editor friend guest judge king lawyer miner nurse owner pilot queen rider singer tailor
"""

_ADJECTIVES = """
amber brave calm dusty early faint gentle hollow icy jolly keen lively mellow narrow olden plain quiet rapid silent tender
upper vivid warm young bitter clever distant eager fancy grand heavy inner joyful kind little modern noble open proud rough
simple tall useful violet wise yellow bright crisp deep empty flat green huge iron junior large mild new orange pale red
"""

_VERBS = """
carries follows passes reaches watches crosses paints builds finds moves holds opens closes leaves visits repairs sells buys
counts keeps sends lifts turns covers meets joins
"""

_CATEGORIES = {
    "animals": "horse tiger rabbit camel donkey monkey pigeon turtle salmon spider beetle whale goose sheep",
    "fruits": "apple banana cherry peach mango grape melon plum pear apricot papaya lime fig date",
    "tools": "saw drill wrench chisel pliers axe file clamp spade rake broom brush scissors crowbar",
    "clothes": "shirt coat scarf sock shoe hat skirt belt dress vest boot sweater trousers tie",
}

NOUNS, ADJECTIVES, VERBS = _NOUNS.split(), _ADJECTIVES.split(), _VERBS.split()
CATEGORIES = {name: words.split() for name, words in _CATEGORIES.items()}
