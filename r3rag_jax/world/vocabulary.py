"""The words from which the names in the fictional encyclopedia are composed.

First names, last names and the roots of place names are each one token of the bundled tokenizer. There are hundreds of
them, so that two names in the same context rarely share a token.
"""

import itertools

_SYLLABLES = (
    "Bal Bren Cal Cor Dal Dor Dun Els Fal Fen Gal Gor Hal Hem Ith Jar Jor Kal Kel Kor Lan Lor Mar Mel Mor Nal Nev "
    "Nor Ost Pal Pel Quen Ral Ren Ros Sal Sev Sol Tal Tev Tor Ul Val Ven Vor Wal Wen Yar Zan Zor"
).split()


def _spread(syllables: list[str], ends: list[str], count: int) -> tuple[str, ...]:
    """`count` distinct combinations of a syllable and an end, ordered so that neighbours share neither."""
    turns = itertools.cycle(range(len(ends)))
    order = [
        syllable + ends[(turn + shift) % len(ends)]
        for shift in range(len(ends))
        for syllable, turn in zip(syllables, turns, strict=False)
    ]
    return tuple(dict.fromkeys(order))[:count]


FIRST_NAMES = _spread(_SYLLABLES, "a ela en eth ia ian ic in ina is o on us".split(), 300)
LAST_NAMES = _spread(
    _SYLLABLES, "ach ade akis ander berg dane elli etti ford gard heim iski lund mont rud sen stad vik".split(), 400
)
ROOTS = _spread(_SYLLABLES, "am em im om um".split(), 200)
CITY_ENDS = "abad bury chester dale fell field ham haven minster mouth port stead ton ville wick worth".split()
COUNTRY_ENDS = "aria atia avia enia istan landia onia uria".split()
RIVER_ENDS = "ash ava een ible ine oke orn ue yx".split()
COMPANY_KINDS = "Brothers House Pictures Press Records Studios".split()
SCHOOL_KINDS = "Academy College Institute University".split()
TITLE_ADJECTIVES = (
    "Amber Ancient Bitter Black Blind Blue Bright Broken Burning Cold Copper Crimson Crooked Dark Distant Empty "
    "Endless Fading Fallen First Foreign Forgotten Frozen Gentle Golden Green Grey Hidden Hollow Iron Last Lonely "
    "Long Lost Lucky Marble Midnight Narrow Northern Old Pale Paper Purple Quiet Red Restless Sacred Savage Second "
    "Secret Silent Silver Sleeping Southern Stolen Strange Sunken Velvet White Wild"
).split()
TITLE_NOUNS = (
    "Anchor Arrow Autumn Bell Bird Book Bridge Candle Castle Circle Clock Compass Crown Dancer Desert Door Dream "
    "Echo Empire Feather Field Fire Flower Forest Fountain Garden Ghost Harbor Harvest Horse House Island Journey "
    "Key King Lake Lantern Letter Light Lion Mask Mirror Moon Mountain Night Ocean Orchard Palace Pearl Promise "
    "Queen Rain River Road Rose Sea Shadow Ship Song Stone Storm Stranger Summer Sword Temple Throne Tide Tower "
    "Train Valley Violin Voice Wall Whisper Window Winter Wolf"
).split()
