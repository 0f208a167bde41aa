"""SNOMED CT codes of structures that networks segment, by their usual names.

Each code stands in the dictionary of DICOM's standard codes that pydicom carries, which a test compares. Names are
those of TotalSegmentator and of public challenges; a structure that is not here, or whose code that dictionary does not
have, has no code rather than a near one.
"""

from __future__ import annotations

import re

STRUCTURES = """
    12738006    Brain                          brain
    119238007   Brain stem                     brainstem, brain stem
    113305005   Cerebellum                     cerebellum
    5366008     Hippocampus                    hippocampus
    4958002     Amygdala                       amygdala
    42695009    Thalamus                       thalamus
    11000004    Caudate nucleus                caudate, caudate nucleus
    89278009    Putamen                        putamen
    14738005    Globus pallidus                pallidum, globus pallidus
    427667007   Nucleus accumbens              accumbens, nucleus accumbens
    88442005    Corpus callosum                corpus callosum
    66720007    Lateral ventricle              lateral ventricle
    35918002    Fourth ventricle               fourth ventricle
    56329008    Pituitary                      pituitary, pituitary gland
    244453006   Optic chiasm                   optic chiasm
    18234004    Optic nerve                    optic nerve
    81745001    Eye                            eye
    78076003    Lens of eye                    lens, eye lens
    2748008     Spinal cord                    spinal cord
    89546000    Skull                          skull
    91609006    Mandible                       mandible
    70925003    Maxilla                        maxilla
    45289007    Parotid gland                  parotid, parotid gland
    54019009    Submandibular gland            submandibular gland
    13561001    Lacrimal gland                 lacrimal gland
    21974007    Tongue                         tongue
    74262004    Oral cavity                    oral cavity
    54066008    Pharynx                        pharynx
    4596009     Larynx                         larynx
    69748006    Thyroid gland                  thyroid, thyroid gland
    44567001    Trachea                        trachea
    32849002    Esophagus                      esophagus, oesophagus
    39607008    Lung                           lung, lungs
    45653009    Upper lobe of lung             lung upper lobe
    72481006    Middle lobe of right lung      right lung middle lobe
    90572001    Lower lobe of lung             lung lower lobe
    955009      Bronchus                       bronchus
    9875009     Thymus                         thymus
    76752008    Breast                         breast
    80891009    Heart                          heart
    82471001    Left atrium                    left atrium, left heart atrium
    73829009    Right atrium                   right atrium, right heart atrium
    87878005    Left ventricle of heart        left heart ventricle
    53085002    Right ventricle of heart       right heart ventricle
    33626005    Left auricular appendage       left atrial appendage
    76848001    Pericardium                    pericardium
    15825003    Aorta                          aorta
    81040000    Pulmonary artery               pulmonary artery
    122972007   Pulmonary vein                 pulmonary vein
    48345005    Superior vena cava             superior vena cava
    64131007    Inferior vena cava             inferior vena cava, postcava
    12691009    Brachiocephalic artery         brachiocephalic trunk
    8887007     Brachiocephalic vein           brachiocephalic vein
    36765005    Subclavian artery              subclavian artery
    32062004    Common carotid artery          common carotid artery
    86117002    Internal carotid artery        internal carotid artery
    73634005    Common iliac artery            iliac artery, common iliac artery
    46027005    Common iliac vein              iliac vena, iliac vein, common iliac vein
    32764006    Portal vein                    portal vein
    41801008    Coronary artery                coronary artery, coronary arteries
    10200004    Liver                          liver
    28231008    Gallbladder                    gallbladder, gall bladder
    78961009    Spleen                         spleen
    15776009    Pancreas                       pancreas
    23451007    Adrenal gland                  adrenal, adrenal gland
    64033007    Kidney                         kidney, kidneys
    69695003    Stomach                        stomach
    38848004    Duodenum                       duodenum
    30315005    Small intestine                small bowel, small intestine
    71854001    Colon                          colon
    34402009    Rectum                         rectum
    89837001    Urinary bladder                bladder, urinary bladder
    41216001    Prostate                       prostate
    64739004    Seminal vesicle                seminal vesicle
    35039007    Uterus                         uterus
    15497006    Ovary                          ovary
    40689003    Testis                         testis
    54735007    Sacrum                         sacrum
    14806007    C1 vertebra                    vertebrae c1, vertebra c1
    39976000    C2 vertebra                    vertebrae c2, vertebra c2
    113205007   C3 vertebra                    vertebrae c3, vertebra c3
    5329002     C4 vertebra                    vertebrae c4, vertebra c4
    36978003    C5 vertebra                    vertebrae c5, vertebra c5
    36054005    C6 vertebra                    vertebrae c6, vertebra c6
    87391001    C7 vertebra                    vertebrae c7, vertebra c7
    64864005    T1 vertebra                    vertebrae t1, vertebra t1
    53733008    T2 vertebra                    vertebrae t2, vertebra t2
    1626008     T3 vertebra                    vertebrae t3, vertebra t3
    73071006    T4 vertebra                    vertebrae t4, vertebra t4
    56401006    T5 vertebra                    vertebrae t5, vertebra t5
    45296009    T6 vertebra                    vertebrae t6, vertebra t6
    62487009    T7 vertebra                    vertebrae t7, vertebra t7
    11068009    T8 vertebra                    vertebrae t8, vertebra t8
    82687006    T9 vertebra                    vertebrae t9, vertebra t9
    7610001     T10 vertebra                   vertebrae t10, vertebra t10
    12989004    T11 vertebra                   vertebrae t11, vertebra t11
    23215003    T12 vertebra                   vertebrae t12, vertebra t12
    66794005    L1 vertebra                    vertebrae l1, vertebra l1
    14293000    L2 vertebra                    vertebrae l2, vertebra l2
    36470004    L3 vertebra                    vertebrae l3, vertebra l3
    11994002    L4 vertebra                    vertebrae l4, vertebra l4
    49668003    L5 vertebra                    vertebrae l5, vertebra l5
    51282000    Vertebra                       vertebra, vertebrae
    113197003   Rib                            rib, ribs
    50016007    Costal cartilage               costal cartilage, costal cartilages
    56873002    Sternum                        sternum
    51299004    Clavicle                       clavicle, clavicula
    79601000    Scapula                        scapula
    85050009    Humerus                        humerus
    62413002    Radius                         radius
    23416004    Ulna                           ulna
    71341001    Femur                          femur
    64234005    Patella                        patella
    12611008    Tibia                          tibia
    87342007    Fibula                         fibula
    127954009   Skeletal muscle                skeletal muscle
"""
"""Code, meaning and names, two spaces or more between them."""

SIDES = {"left", "right"}


def _key(name: str) -> frozenset[str]:
    """Return the words of a name in lower case; their order, "of" and the numbers of ribs do not count."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = frozenset(re.findall(r"[a-z0-9]+", spaced.lower())) - {"of", "the"}
    return frozenset(word for word in words if not word.isdecimal()) if "rib" in words else words


def _table() -> dict[frozenset[str], tuple[str, str]]:
    rows = (re.split(r"\s{2,}", line.strip()) for line in STRUCTURES.strip().splitlines())
    return {_key(name): (code, meaning) for code, meaning, names in rows for name in names.split(", ")}


CODES = _table()


def snomed_of(name: str) -> tuple[str, str, str | None] | None:
    """Return code, meaning and side ("left", "right" or None) of a structure by its name; None where it is not known.

    `kidney_left`, "Left Kidney" and "LeftKidney" are the same. Where a code has the side in itself, as that of the left
    atrium, there is no other.
    """
    key = _key(name)
    sides = key & SIDES
    if key in CODES:
        return *CODES[key], None
    if len(sides) == 1 and key - sides in CODES:
        return *CODES[key - sides], next(iter(sides))
    return None
