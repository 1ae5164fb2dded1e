"""Medical rows: textbook definitions and facts, and quantities that are computed. Not medical advice."""

from __future__ import annotations

import random
from collections.abc import Callable

# term -> what it is; every answer reads "<Term> is <definition>."
_TERMS = {
    "anemia": "a shortage of healthy red blood cells, so that tissues receive too little oxygen",
    "angina": "chest pain caused by reduced blood flow to the heart muscle",
    "aphasia": "a loss of the ability to use or understand language, caused by damage to the brain",
    "appendicitis": "an inflammation of the appendix that usually causes pain in the lower right abdomen",
    "arrhythmia": "an abnormal rhythm of the heartbeat",
    "arthritis": "an inflammation of one or more joints that causes pain and stiffness",
    "asthma": "a chronic disease in which the airways narrow and swell, making it hard to breathe",
    "atherosclerosis": "a build-up of fatty plaque inside the walls of the arteries",
    "bradycardia": "a resting heart rate that is slower than normal, below 60 beats per minute in adults",
    "bronchitis": "an inflammation of the lining of the bronchial tubes of the lungs",
    "a cataract": "a clouding of the lens of the eye that blurs vision",
    "cellulitis": "a bacterial infection of the deeper layers of the skin",
    "cholecystitis": "an inflammation of the gallbladder, most often caused by gallstones",
    "cirrhosis": "a scarring of the liver that replaces healthy tissue and reduces its function",
    "conjunctivitis": "an inflammation of the thin membrane that covers the white of the eye",
    "cyanosis": "a bluish colour of the skin caused by too little oxygen in the blood",
    "dermatitis": "an inflammation of the skin that causes itching and redness",
    "dysphagia": "a difficulty in swallowing",
    "dyspnea": "a feeling of shortness of breath",
    "an edema": "a swelling caused by fluid that collects in the tissues",
    "an embolism": "a blockage of a blood vessel by a clot or other material carried in the blood",
    "encephalitis": "an inflammation of the brain, most often caused by a virus",
    "epilepsy": "a disorder of the brain that causes repeated seizures",
    "gastritis": "an inflammation of the lining of the stomach",
    "glaucoma": "a group of eye diseases that damage the optic nerve, often by raised pressure in the eye",
    "gout": "a form of arthritis caused by crystals of uric acid in the joints",
    "hematuria": "the presence of blood in the urine",
    "hepatitis": "an inflammation of the liver, most often caused by a virus",
    "hypertension": "a blood pressure that stays too high, which strains the heart and the arteries",
    "hyperthyroidism": "an overproduction of hormones by the thyroid gland, which speeds up metabolism",
    "hypoglycemia": "a level of sugar in the blood that is lower than normal",
    "hypothermia": "a dangerous drop of the body temperature below 35 degrees Celsius",
    "hypothyroidism": "an underproduction of hormones by the thyroid gland, which slows down metabolism",
    "insomnia": "a lasting difficulty in falling asleep or staying asleep",
    "ischemia": "a supply of blood to a tissue that is too low for its needs",
    "jaundice": "a yellow colour of the skin and eyes caused by too much bilirubin in the blood",
    "leukemia": "a cancer of the blood-forming tissues that produces abnormal white blood cells",
    "meningitis": "an inflammation of the membranes around the brain and the spinal cord",
    "a migraine": "a strong, often one-sided headache that may come with nausea and sensitivity to light",
    "myopia": "near-sightedness: distant objects look blurred, as light is focused before the retina",
    "nephritis": "an inflammation of the kidneys",
    "neuropathy": "damage to peripheral nerves that causes numbness, tingling or weakness",
    "osteoporosis": "a loss of bone density that makes bones fragile and likely to break",
    "otitis media": "an infection or inflammation of the middle ear",
    "pancreatitis": "an inflammation of the pancreas",
    "peritonitis": "an inflammation of the membrane that lines the abdomen",
    "pneumonia": "an infection that inflames the air sacs of one or both lungs",
    "psoriasis": "a chronic skin disease in which skin cells build up into scaly, itchy patches",
    "rhinitis": "an inflammation of the lining of the nose",
    "sciatica": "a pain that runs from the lower back down the leg along the sciatic nerve",
    "scoliosis": "a sideways curve of the spine",
    "sepsis": "a life-threatening reaction of the body to an infection, in which its own organs are damaged",
    "sinusitis": "an inflammation of the sinuses",
    "a stroke": "a loss of brain function caused by a blocked or burst blood vessel in the brain",
    "tachycardia": "a resting heart rate that is faster than normal, above 100 beats per minute in adults",
    "tendinitis": "an inflammation of a tendon, often caused by repeated strain",
    "thrombosis": "the formation of a blood clot inside a blood vessel",
    "tinnitus": "a ringing or buzzing in the ears without an outside sound",
    "tuberculosis": "a bacterial infection that mostly affects the lungs",
    "vertigo": "a false feeling that oneself or the surroundings are spinning",
}
_ASK_TERM = (
    "What is {}?",
    "Define {}.",
    "Explain briefly what {} is.",
    "In medicine, what is {}?",
    "A patient asks: what is {}?",
    "How would you describe {} to a patient?",
    "Give a short definition of {}.",
)
_ORGANS = {
    "the heart": ("cardiologist", "pumps blood through the body"),
    "the kidneys": ("nephrologist", "filter waste and excess water from the blood"),
    "the lungs": ("pulmonologist", "take up oxygen and release carbon dioxide"),
    "the skin": ("dermatologist", "protects the body and helps to control its temperature"),
    "the stomach": ("gastroenterologist", "breaks food down with acid and enzymes"),
    "the brain": ("neurologist", "controls thought, movement and the senses"),
    "the eyes": ("ophthalmologist", "turn light into nerve signals"),
    "the thyroid": ("endocrinologist", "produces hormones that set the pace of metabolism"),
    "the liver": ("hepatologist", "processes nutrients, makes bile and breaks down toxins"),
    "the joints": ("rheumatologist", "let bones move against each other"),
    "the bladder": ("urologist", "stores urine until it is released"),
    "the blood": ("hematologist", "carries oxygen, nutrients and immune cells"),
}
_DEFICIENCIES = {
    "vitamin A": "night blindness",
    "vitamin B1": "beriberi",
    "vitamin B3": "pellagra",
    "vitamin B12": "pernicious or megaloblastic anemia",
    "vitamin C": "scurvy",
    "vitamin D": "rickets in children",
    "vitamin K": "a tendency to bleed",
    "iodine": "goiter",
    "iron": "iron-deficiency anemia",
}
_ASK_DEFICIENCY = (
    "Which disease is caused by a lack of {}?",
    "What can a deficiency of {} lead to?",
    "A diet contains too little {}. Which condition may follow?",
)


def _definition(rng: random.Random) -> tuple[str, str]:
    term, meaning = rng.choice(list(_TERMS.items()))
    return rng.choice(_ASK_TERM).format(term), f"{term[0].upper()}{term[1:]} is {meaning}."


def _which_term(rng: random.Random) -> tuple[str, str]:
    term, meaning = rng.choice(list(_TERMS.items()))
    return (
        f"Which medical term means {meaning}?",
        f"The term is {term.removeprefix('a ').removeprefix('an ')}.",
    )


def _organ(rng: random.Random) -> tuple[str, str]:
    organ, (specialist, function) = rng.choice(list(_ORGANS.items()))
    if rng.random() < 0.5:
        article = "An" if specialist[0] in "aeiou" else "A"
        return (
            f"Which specialist treats diseases of {organ}?",
            f"{article} {specialist} treats diseases of {organ}.",
        )
    return f"What is the main function of {organ}?", f"{organ.capitalize()} {function}."


def _deficiency(rng: random.Random) -> tuple[str, str]:
    nutrient, disease = rng.choice(list(_DEFICIENCIES.items()))
    return rng.choice(_ASK_DEFICIENCY).format(nutrient), f"A lack of {nutrient} can cause {disease}."


def _body_mass_index(rng: random.Random) -> tuple[str, str]:
    weight, height = rng.randint(45, 120), rng.randint(150, 200)
    metres = height / 100
    index = weight / metres**2
    question = f"A patient weighs {weight} kg and is {metres:.2f} m tall. What is the body mass index?"
    return question, f"The body mass index is {weight} / {metres:.2f}² = {index:.1f} kg/m²."


def _dose(rng: random.Random) -> tuple[str, str]:
    weight, per_kilogram = rng.randint(10, 95), rng.choice((2, 5, 8, 10, 15))
    question = f"A drug is prescribed at {per_kilogram} mg per kg. What is the dose for a patient of {weight} kg?"
    return question, f"The dose is {per_kilogram} × {weight} = {per_kilogram * weight} mg."


def _arterial_pressure(rng: random.Random) -> tuple[str, str]:
    diastolic = rng.randint(55, 100)
    systolic = diastolic + 3 * rng.randint(10, 22)
    mean = diastolic + (systolic - diastolic) // 3
    question = f"Estimate the mean arterial pressure for a blood pressure of {systolic}/{diastolic} mmHg."
    return question, f"It is about {diastolic} + ({systolic} - {diastolic}) / 3 = {mean} mmHg."


def _temperature(rng: random.Random) -> tuple[str, str]:
    celsius = rng.randint(350, 415) / 10
    question = f"Convert a body temperature of {celsius:.1f} degrees Celsius to Fahrenheit."
    return question, f"{celsius:.1f} × 1.8 + 32 = {celsius * 1.8 + 32:.1f} degrees Fahrenheit."


def _heart_rate(rng: random.Random) -> tuple[str, str]:
    beats, seconds = rng.randint(9, 40), rng.choice((10, 15, 20, 30))
    rate = beats * 60 // seconds
    question = f"A nurse counts {beats} pulse beats in {seconds} seconds. What is the heart rate?"
    return question, f"The heart rate is {beats} × {60 // seconds} = {rate} beats per minute."


_TEMPLATES: tuple[tuple[Callable[[random.Random], tuple[str, str]], int], ...] = (
    (_definition, 10),
    (_which_term, 2),
    (_organ, 1),
    (_deficiency, 1),
    (_body_mass_index, 1),
    (_dose, 1),
    (_arterial_pressure, 1),
    (_temperature, 1),
    (_heart_rate, 1),
)


def pair(rng: random.Random) -> tuple[str, str]:
    """One (question, answer) of medicine: mostly definitions, some computed quantities."""
    template = rng.choices([t for t, _ in _TEMPLATES], [weight for _, weight in _TEMPLATES])[0]
    return template(rng)
