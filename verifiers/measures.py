"""Units of measure and money: their factors and dimensions."""

from __future__ import annotations

# unit: (factor to the base unit, exponents of base dimensions)
_LENGTH = {
    "mm": "1/1000", "cm": "1/100", "dm": "1/10", "m": "1", "km": "1000", "nm": "1/1000000000",
    "inch": "127/5000", "in": "127/5000", "ft": "381/1250", "foot": "381/1250",
    "yd": "1143/1250", "yard": "1143/1250", "mi": "201168/125", "mile": "201168/125",
    "meter": "1", "metre": "1", "centimeter": "1/100", "centimetre": "1/100",
    "millimeter": "1/1000", "millimetre": "1/1000", "kilometer": "1000", "kilometre": "1000",
    "decimeter": "1/10", "米": "1", "厘米": "1/100", "千米": "1000", "公里": "1000",
    "毫米": "1/1000", "分米": "1/10", "feet": "381/1250", "inches": "127/5000",
}  # fmt: skip
_MASS = {
    "mg": "1/1000000", "g": "1/1000", "kg": "1", "t": "1000", "ton": "1000", "tonne": "1000",
    "gram": "1/1000",
    "kilogram": "1", "milligram": "1/1000000", "lb": "45359237/100000000",
    "lbs": "45359237/100000000",
    "pound": "45359237/100000000", "oz": "45359237/1600000000", "ounce": "45359237/1600000000",
    "克": "1/1000", "千克": "1", "公斤": "1", "吨": "1000",
}  # fmt: skip
_TIME = {
    "ms": "1/1000", "s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60",
    "mins": "60", "secs": "1",
    "h": "3600", "hr": "3600", "hrs": "3600", "hour": "3600", "day": "86400", "week": "604800",
    "秒": "1", "分钟": "60", "小时": "3600", "时": "3600", "天": "86400", "日": "86400",
    "周": "604800",
}  # fmt: skip
_CALENDAR = {
    "month": "1", "year": "12", "yr": "12", "decade": "120", "century": "1200", "月": "1",
    "个月": "1", "年": "12",
}  # fmt: skip
_VOLUME = {
    "ml": "1/1000000", "mL": "1/1000000", "l": "1/1000", "L": "1/1000", "liter": "1/1000",
    "litre": "1/1000", "milliliter": "1/1000000", "millilitre": "1/1000000", "cc": "1/1000000",
    "升": "1/1000", "毫升": "1/1000000",
}  # fmt: skip
_CUSTOMARY = {
    "cup": "1", "pint": "2", "quart": "4", "gallon": "16", "gal": "16", "tablespoon": "1/16",
    "tbsp": "1/16", "teaspoon": "1/48", "tsp": "1/48",
}  # fmt: skip
_ANGLE = {"degree": "1", "deg": "1", "°": "1", "arcmin": "1/60", "arcsec": "1/3600", "度": "1"}
_MONEY = {
    "USD": "1", "dollar": "1", "buck": "1", "cent": "1/100", "¢": "1/100", "美元": "1",
    "penny": "1/100",
    "pennies": "1/100",
    "nickel": "1/20", "dime": "1/10", "quarter": "1/4",
}  # fmt: skip
_OTHER_MONEY = {
    "EUR": ("euro", "1"), "euro": ("euro", "1"), "GBP": ("gbp", "1"), "CNY": ("cny", "1"),
    "yuan": ("cny", "1"), "元": ("cny", "1"), "角": ("cny", "1/10"), "分": ("cny", "1/100"),
    "RMB": ("cny", "1"),
    "rmb": ("cny", "1"), "人民币": ("cny", "1"), "INR": ("inr", "1"), "rupee": ("inr", "1"),
    "Rs": ("inr", "1"), "ruble": ("rub", "1"), "RUB": ("rub", "1"), "KRW": ("krw", "1"),
    "won": ("krw", "1"),
    "yen": ("jpy", "1"), "块": ("cny", "1"),
}  # fmt: skip
_DERIVED = {
    "mph": ("201168/450000", {"L": 1, "T": -1}), "kph": ("5/18", {"L": 1, "T": -1}),
    "kmh": ("5/18", {"L": 1, "T": -1}), "Hz": ("1", {"T": -1}), "hertz": ("1", {"T": -1}),
    "N": ("1", {"M": 1, "L": 1, "T": -2}),
    "newton": ("1", {"M": 1, "L": 1, "T": -2}), "J": ("1", {"M": 1, "L": 2, "T": -2}),
    "joule": ("1", {"M": 1, "L": 2, "T": -2}), "kJ": ("1000", {"M": 1, "L": 2, "T": -2}),
    "W": ("1", {"M": 1, "L": 2, "T": -3}),
    "watt": ("1", {"M": 1, "L": 2, "T": -3}), "kW": ("1000", {"M": 1, "L": 2, "T": -3}),
    "Pa": ("1", {"M": 1, "L": -1, "T": -2}),
    "acre": ("4046856422400/1000000000", {"L": 2}), "hectare": ("10000", {"L": 2}),
    "ha": ("10000", {"L": 2}),
    "公顷": ("10000", {"L": 2}), "亩": ("2000/3", {"L": 2}),
    "平方米": ("1", {"L": 2}), "平方厘米": ("1/10000", {"L": 2}), "立方米": ("1", {"L": 3}),
    "平方分米": ("1/100", {"L": 2}),
    "立方厘米": ("1/1000000", {"L": 3}),
    "立方分米": ("1/1000", {"L": 3}), "平方千米": ("1000000", {"L": 2}),
    "平方公里": ("1000000", {"L": 2}),
    "sqft": ("145161/1562500", {"L": 2}), "radian": ("1", {"rad": 1}), "rad": ("1", {"rad": 1}),
    "percent": ("1/100", {}), "pct": ("1/100", {}), "percentage": ("1/100", {}),
    "C": ("1", {"degC": 1}), "F": ("1", {"degF": 1}), "K": ("1", {"kelvin": 1}),
    "celsius": ("1", {"degC": 1}), "Celsius": ("1", {"degC": 1}),
    "fahrenheit": ("1", {"degF": 1}), "Fahrenheit": ("1", {"degF": 1}),
}  # fmt: skip

UNITS: dict[str, tuple[str, dict[str, int]]] = dict(_DERIVED)
for _table, _dimension in (
    (_LENGTH, {"L": 1}), (_MASS, {"M": 1}), (_TIME, {"T": 1}), (_CALENDAR, {"cal": 1}),
    (_VOLUME, {"L": 3}), (_CUSTOMARY, {"cup": 1}), (_ANGLE, {"deg": 1}), (_MONEY, {"usd": 1}),
):  # fmt: skip
    UNITS |= {_name: (_factor, _dimension) for _name, _factor in _table.items()}
UNITS |= {_name: (_factor, {_code: 1}) for _name, (_code, _factor) in _OTHER_MONEY.items()}
