"""Apriel 2 with a vision encoder, of which the text model is read. It is written as `apriel2`."""

from gearshift.formats.apriel2 import FORMAT as APRIEL2
from gearshift.formats.apriel2.sections import model
from gearshift.formats.section_format import SectionFormat
from gearshift.formats.sections import Stated

FORMAT = SectionFormat(
    name=APRIEL2.name,
    model_type="apriel2",
    model=model(
        "Apriel2ForConditionalGeneration",
        Stated("vision_encoder", note="the vision encoder was left out: this is the text model alone"),
        Stated("image_token_index"),
    ),
    tensors=APRIEL2.tensors,
    writable=False,
)
