"""Small hand-written tables from which questions and answers are made."""

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Greece": "Athens",
    "Turkey": "Ankara", "Russia": "Moscow", "Ukraine": "Kyiv", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago",
    "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Australia": "Canberra", "Belgium": "Brussels",
    "the Netherlands": "Amsterdam", "Switzerland": "Bern", "the United States": "Washington", "Iceland": "Reykjavik",
    "Romania": "Bucharest", "Bulgaria": "Sofia", "Croatia": "Zagreb", "Serbia": "Belgrade", "Iran": "Tehran",
    "Iraq": "Baghdad", "Morocco": "Rabat", "Nigeria": "Abuja", "South Korea": "Seoul", "Colombia": "Bogota",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "tall": "short", "fast": "slow", "early": "late", "light": "dark", "old": "new",
    "young": "old", "happy": "sad", "full": "empty", "open": "closed", "rich": "poor", "strong": "weak", "wet": "dry",
    "high": "low", "left": "right", "up": "down", "near": "far", "hard": "soft", "loud": "quiet", "clean": "dirty",
    "thick": "thin", "heavy": "light", "first": "last", "begin": "end", "love": "hate", "win": "lose", "true": "false",
    "day": "night", "black": "white", "inside": "outside", "above": "below", "before": "after", "easy": "difficult",
    "cheap": "expensive", "wide": "narrow", "deep": "shallow", "smooth": "rough", "sharp": "dull", "sweet": "sour",
    "brave": "afraid", "asleep": "awake", "alive": "dead", "always": "never", "all": "none", "give": "take",
    "buy": "sell", "push": "pull", "come": "go", "laugh": "cry", "ask": "answer", "remember": "forget",
}  # fmt: skip
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "a lemon": "yellow",
    "a banana": "yellow", "an orange": "orange", "a carrot": "orange", "a tomato": "red", "a strawberry": "red",
    "milk": "white", "chocolate": "brown", "a leaf": "green", "the sun": "yellow", "a frog": "green",
    "an elephant": "grey", "a mouse": "grey", "a raven": "black", "a swan": "white", "a plum": "purple",
    "a cucumber": "green", "a cherry": "red", "salt": "white", "the sea": "blue", "a pumpkin": "orange",
    "wood": "brown", "a flamingo": "pink", "gold": "yellow", "silver": "grey", "a pea": "green", "ink": "black",
}  # fmt: skip
PLURALS = {
    "cat": "cats", "dog": "dogs", "child": "children", "mouse": "mice", "foot": "feet", "tooth": "teeth",
    "man": "men", "woman": "women", "box": "boxes", "city": "cities", "baby": "babies", "leaf": "leaves",
    "knife": "knives", "goose": "geese", "book": "books", "house": "houses", "bus": "buses", "wolf": "wolves",
    "story": "stories", "sheep": "sheep", "fish": "fish", "table": "tables", "dish": "dishes", "key": "keys",
    "potato": "potatoes", "party": "parties", "life": "lives", "class": "classes", "apple": "apples", "day": "days",
}  # fmt: skip
PASTS = {
    "go": "went", "see": "saw", "eat": "ate", "run": "ran", "write": "wrote", "read": "read", "take": "took",
    "give": "gave", "come": "came", "make": "made", "find": "found", "think": "thought", "bring": "brought",
    "buy": "bought", "sing": "sang", "swim": "swam", "walk": "walked", "play": "played", "open": "opened",
    "call": "called", "know": "knew", "speak": "spoke", "sleep": "slept", "fall": "fell", "begin": "began",
}  # fmt: skip
KINDS = {
    "fruit": ["apple", "pear", "plum", "cherry", "banana", "lemon", "peach", "grape"],
    "animal": ["dog", "cat", "horse", "cow", "sheep", "lion", "tiger", "wolf", "bear", "mouse"],
    "bird": ["raven", "eagle", "duck", "swan", "owl", "goose", "sparrow"],
    "colour": ["red", "blue", "green", "yellow", "white", "black", "brown", "orange"],
    "tool": ["hammer", "saw", "knife", "drill", "axe"],
    "vehicle": ["car", "bus", "train", "boat", "bicycle", "plane", "truck"],
    "piece of furniture": ["table", "chair", "bed", "desk", "sofa"],
    "part of the body": ["hand", "foot", "arm", "leg", "head", "nose", "ear"],
    "drink": ["water", "milk", "tea", "coffee", "juice"],
}  # fmt: skip
SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "sheep": "bleats", "duck": "quacks", "lion": "roars",
    "horse": "neighs", "owl": "hoots", "snake": "hisses", "bee": "buzzes", "wolf": "howls", "mouse": "squeaks",
}  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip
NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Mary", "Noah",
    "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor",
]  # fmt: skip
THINGS = [
    "apples", "books", "coins", "stones", "pencils", "shells", "stamps", "marbles", "eggs", "tickets", "cards",
    "buttons", "candles", "cups", "keys",
]  # fmt: skip
PLACES = ["garden", "kitchen", "school", "park", "library", "market", "forest", "station", "office", "harbour"]
WORDS = sorted(
    {
        *OPPOSITES, *OPPOSITES.values(), *PLURALS, *PASTS, *PLACES, *THINGS,
        *(word for words in KINDS.values() for word in words),
        "river", "mountain", "window", "letter", "music", "paper", "summer", "winter", "garden", "number", "stone",
        "cloud", "bridge", "island", "forest", "friend", "market", "morning", "evening", "road", "ship", "tower",
    }
)  # fmt: skip
SMALL_TALK = [
    (
        ["Hello!", "Hi!", "Hello there.", "Good morning."],
        ["Hello! How can I help you?", "Hello! What can I do for you?"],
    ),
    (
        ["Who are you?", "What are you?", "Tell me about yourself.", "What is your name?"],
        [
            "I am a very small language model. I learned to read from the documentation of Python.",
            "I am a small language model, trained on the documentation of Python.",
        ],
    ),
    (["Thank you!", "Thanks.", "Thank you very much."], ["You are welcome!", "You are welcome. Ask me anything else."]),
    (["Goodbye.", "Bye!", "See you later."], ["Goodbye! Have a nice day.", "Goodbye!"]),
    (
        ["How are you?", "How do you do?", "Are you well?"],
        ["I am well, thank you. How can I help you?", "I am fine, thank you for asking."],
    ),
    (
        ["What can you do?", "How can you help me?", "What do you know?"],
        [
            "I can add numbers, sort words, name capitals and explain a few things about Python. I make mistakes.",
        ],
    ),
    (
        ["Can you make mistakes?", "Are you always right?", "Do you know everything?"],
        ["No. I am a very small model, and I make many mistakes.", "No, I know only a little, and I am often wrong."],
    ),
]
