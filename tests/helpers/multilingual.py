"""Texts in many scripts, and random ones that mix them."""

import random
import unicodedata

SENTENCES = [
    "All human beings are born free and equal in dignity and rights. They're endowed with reason; WE'LL see, I'd say.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Straße, Äpfel, ÜBERMUT, daß's geht.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. L'été, où l'on s'aime, ça va?",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos. ¿Qué año? ¡Mañana!",
    "Todos os seres humanos nascem livres e iguais. Não há informação às 15h30.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İstanbul'da ILIK ışık.",
    "Wszyscy ludzie rodzą się wolni i równi. Zażółć gęślą jaźń.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах. Москва, 1948 год.",
    "Всички хора се раждат свободни. Усі люди народжуються вільними; її, ґанок.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. שָׁלוֹם עֲלֵיכֶם",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. السَّلَامُ عَلَيْكُمْ ١٢٣٤٥",
    "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند. ۱۲۳۴",
    "सभी मनुष्यों को गौरव और अधिकारों के विषय में जन्मजात स्वतन्त्रता और समानता प्राप्त है। क्षत्रिय १२३",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "మనుష్యులందరు స్వతంత్రులుగ జన్మించిరి. ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಹುಟ್ಟಿದ್ದಾರೆ.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ๑๒๓",
    "မြန်မာစာ လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာ။ មនុស្សទាំងអស់កើតមកមានសេរីភាព កាន់តែពិសេសអាច",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。我想在apple工作1314151天～",
    "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。カタカナ・ｶﾞﾊﾞﾅ「引用」ー",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. ㄱㄴㄷ 1948년 12월",
    "ყველა ადამიანი იბადება თავისუფალი. Բոլոր մարդիկ ծնվում են ազատ։ የሰው ልጅ ሁሉ ሲወለድ ነጻ።",
    "Emoji: 😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☎️ 🦙🦙 (normal) 😶‍🌫️ ✅ 🚀🚀 #️⃣ ©®™",
    "Numbers: 3 33 333 3333 33333 333333 3333333 3.14159e-10 0xFF 1,000,000.50 ½ ⅷ ² ₃ ① ４５６ 12th 2nd v1.2.3-rc4",
    "def f(x: int = 0) -> str:\n    return f\"{x!r:>{10}}\"  # comment\n\n\nclass A(B):\n\tpass\n",
    "#include <stdio.h>\r\nint main(void) { printf(\"%d\\n\", 1<<3 | ~0); return a->b[i] != c && !d; }\r\n",
    "<div class='x'>&nbsp;</div> SELECT * FROM `t` WHERE a >= 1; $HOME/.config ~/x \\\\server\\share C:\\Users",
    "$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$ ∀x∈ℝ: ⌈x⌉ ≥ x, ∑ₙ aₙ → ∞, 10 €, £5, ¥100, ₹20",
    "spaces:  two   three    four\ttab\t\ttabs \t mixed \n \n\n \n\n\n \t \t\t\r\n\r\n  end   ",
    "''''''```````\"\"\"\"......!!!!!!?????? ------======= … — – « » „ “ ” ‘ ’ ‹ › · • † ‡ § ¶ ^ ~ | + < = >",
    "I'VE been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL don'T ſ'ſ",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case iPhone15Pro ABCdef x86_64 aBC École ÉCOLE éCole",
    "control: \x00 \x01\x02 \x0b \x0c \x1b[31m \x7f \x85 \xa0nbsp\xa0 \u200bzw\u200b "
    "\u2028line \u2029par \u3000ideographic\u3000 \ufeffbom",
    "private \ue000 \uf8ff, unassigned-like \U000e0001 tag, replacement \ufffd, "
    "noncharacter-free, 𝒜𝓁𝑔𝑒𝒷𝓇𝒶 𝟙𝟚𝟛, 𐍈𐌰𐌹, 𓀀𓂀, 𠀀𠮷",
    "combining: e\u0301 a\u030a\u0323 Z\u0351\u036b\u0343a\u0300\u0301l\u0302g\u0308o\u0327 "
    "\u0301alone क\u094d\u200dष ไทย\u0e49\u0e49",
]  # fmt: skip
TEXTS = [
    "", " ", "  ", "\n", "\n\n\n", "\t", " \n ", "a", " a", "a ", "  a  b  ", "Hello world", "Hello   world\n\n  x",
    *SENTENCES, *(unicodedata.normalize(form, s) for form in ("NFD", "NFC") for s in SENTENCES),
    "\n".join(SENTENCES), " ".join(SENTENCES[::-1]),
]  # fmt: skip
WORDS = [word for sentence in SENTENCES for word in sentence.split()]
GLUE = [
    "",
    "",
    "",
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "'",
    "-",
    ".",
    ", ",
    "_",
    "/",
    "!?",
    "'s",
    "\xa0",
    "\u3000",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Words of SENTENCES, whole or cut, and single characters of them, with anything in between."""
    rng = random.Random(seed)
    characters = sorted(set("".join(SENTENCES)))

    def part() -> str:
        word = rng.choice(WORDS)
        kinds = word, word[rng.randrange(len(word)) :], rng.choice(characters), word.upper(), str(rng.randrange(10**6))
        return rng.choice(GLUE) + rng.choice(kinds)

    return ["".join(part() for _ in range(rng.randrange(1, 15))) for _ in range(count)]
