"""The concepts of configs/emoji.py: 64 that all seven sets draw and that read well at 32 px."""

CONCEPTS = (
    "red-apple", "banana", "cherries", "grapes", "watermelon", "strawberry", "lemon", "carrot",
    "mushroom", "pizza", "hamburger", "doughnut", "birthday-cake", "hot-beverage", "wine-glass", "ice-cream",
    "dog-face", "cat-face", "pig-face", "tiger-face", "rabbit-face", "monkey-face", "penguin", "octopus",
    "butterfly", "honeybee", "lady-beetle", "snail", "turtle", "tropical-fish", "spouting-whale", "crab",
    "sunflower", "rose", "tulip", "cactus", "evergreen-tree", "palm-tree", "maple-leaf", "sun",
    "crescent-moon", "star", "cloud", "rainbow", "snowflake", "fire", "umbrella", "balloon",
    "wrapped-gift", "red-heart", "soccer-ball", "basketball", "trophy", "guitar", "violin", "key",
    "light-bulb", "bell", "rocket", "automobile", "airplane", "sailboat", "crown", "ghost",
)  # fmt: skip
