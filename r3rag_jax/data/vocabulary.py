"""The word lists that the fictional encyclopedia draws its names from."""

ROOTS = (
    "Bal Bren Cal Cor Dal Dor Dun Els Fal Fen Gal Gor Hal Hem Ith Jar Jor Kal Kel Kor Lan Lor Mar Mel "
    "Mor Nal Nev Nor Ost Pal Pel Quen Ral Ren Ros Sal Sev Sol Tal Tev Tor Ul Val Ven Vor Wal Wen Yar Zan Zor"
).split()
FIRST_ENDS = "a an ela en eth ia ian ic in ina is o on or u us".split()
LAST_ENDS = "ach ade akis ander berg dane elli etti ford gard heim iski lund mont nov rud sen sky stad vik".split()
CITY_ENDS = "abad bury chester dale fell field ham haven holm mere minster mouth port stead ton ville wick worth".split()
COUNTRY_ENDS = "aria atia avia enia istan landia onia uria".split()
RIVER_ENDS = "ash ava een eth ible ine oke orn ue yx".split()
TITLE_ADJECTIVES = (
    "Amber Ancient Bitter Black Blind Blue Bright Broken Burning Cold Copper Crimson Crooked Dark Distant "
    "Empty Endless Fading Fallen First Foreign Forgotten Frozen Gentle Golden Green Grey Hidden Hollow Iron "
    "Last Lonely Long Lost Lucky Marble Midnight Narrow Northern Old Pale Paper Purple Quiet Red Restless "
    "Sacred Savage Second Secret Silent Silver Sleeping Southern Stolen Strange Sunken Velvet White Wild"
).split()
TITLE_NOUNS = (
    "Anchor Arrow Autumn Bell Bird Book Bridge Candle Castle Circle Clock Compass Crown Dancer Desert Door "
    "Dream Echo Empire Feather Field Fire Flower Forest Fountain Garden Ghost Harbor Harvest Horse House "
    "Island Journey Key King Lake Lantern Letter Light Lion Mask Mirror Moon Mountain Night Ocean Orchard "
    "Palace Pearl Promise Queen Rain River Road Rose Sea Shadow Ship Song Stone Storm Stranger Summer Sword "
    "Temple Throne Tide Tower Train Valley Violin Voice Wall Whisper Window Winter Wolf"
).split()
COMPANY_KINDS = "Brothers House Pictures Press Records Studios".split()
SCHOOL_KINDS = "Academy College Institute University".split()
