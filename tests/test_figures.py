"""A figure in one room: its chapter opens with what is committed, and has everything that belongs to the figure."""
import json, re
from pathlib import Path
import pytest
from rlheals.results.claims import CLAIMS
from rlheals.running.figures import FIGURES

ROOT = Path(__file__).parents[1]
CHAPTERS = {m[1]: p for p in sorted((ROOT/'nbs').rglob('*.ipynb'))
            if (m := re.search(r'#\| default_exp ([\w.]+)', p.read_text()))}


def position(cells, text):
    found = [i for i, c in enumerate(cells) if text in ''.join(c['source'])]
    assert len(found) == 1, (text, found)
    return found[0]


@pytest.mark.parametrize('name', FIGURES)
def test_a_chapter_shows_the_committed_figure_before_it_draws_another(name):
    f, function = FIGURES[name], name.lower()
    cells = json.loads(CHAPTERS[f.__module__.removeprefix('rlheals.')].read_text())['cells']
    shown, drawn, said = (
        position(cells, text) for text in (f'kept({function}', f'def {function}(tables)', f'@{function}.reads')
    )
    assert shown < drawn < said
    text = ''.join(cells[shown]['outputs'][0]['data']['text/markdown'])
    for picture in re.findall(r'\]\(\.\./\.\./(figures/[^)]+)\)', text): assert (ROOT/picture).exists(), picture
    assert f'{name}.png' in text


@pytest.mark.parametrize('name', FIGURES)
def test_what_belongs_to_a_figure_is_registered(name):
    f = FIGURES[name]
    assert f.name == name and f.needs and f.title and set(f.claims) <= set(CLAIMS)
    assert f.reading.__module__ == f.__module__  # beside the drawing
