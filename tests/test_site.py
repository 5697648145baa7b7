"""The site: every page is there, no link leads nowhere, every public name has an example."""
import json, re, shutil
from pathlib import Path
import pytest
from rlheals import site  # TODO
from rlheals.running.site import ROOT, broken_links, build_site, entries, find_example, read_pages


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "(directory of the site, its pages, its broken links)"
    folder = tmp_path_factory.mktemp('docs')
    return build_site(folder/'site', folder/'build')


def test_every_notebook_and_figure_is_there_and_no_link_is_broken(built):
    folder, made, broken = built
    assert broken == []
    for notebook in (ROOT/'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' in notebook.parts: continue
        assert (folder/notebook.relative_to(ROOT/'nbs').with_suffix('.html')).exists(), notebook
    shown = (folder/'figures.html').read_text()
    for figure in (ROOT/'figures').rglob('*.png'): assert f'src="{figure.relative_to(ROOT)}"' in shown, figure


def test_links_to_notebooks_figures_and_sections(built):
    home, sft = ((built[0]/f'{page}.html').read_text() for page in ('index', 'paper/01_sft'))
    assert 'href="09_sft.html"' in home and 'src="figures/F1.png"' in home and 'href="paper/Snakefile.html"' in home
    assert 'href="../09_sft.html"' in sft
    assert not [p for p in built[0].rglob('*.html') if re.search(r'href="[^"]*\.ipynb["#]', p.read_text())]


def test_reading_order(built):
    "The menu goes as the chapters do; each page leads to the next."
    pages = [p.to.replace('.md', '.html') for p in built[1].pages]
    for here, there in zip(pages[1:], pages[2:]):  # the next of the last chapter is the first of the chain
        following = re.search(
            r'<a href="([^"]+)" class="md-footer__link md-footer__link--next"', (built[0] / here).read_text()
        )
        if here == max(p for p in pages if p.startswith('paper/')) or not (
            here[0].isdigit() or here.startswith('paper/')
        ):
            continue
        assert ((built[0]/here).parent/following[1]).resolve() == (built[0]/there).resolve(), here


def test_search_finds_words_of_a_chapter(built):
    index = json.loads((built[0]/'search'/'search_index.json').read_text())
    found = {d['location'].split('#')[0] for d in index['docs'] if 'singular values' in d['text']}
    assert {'15_spectra.html', 'api/spectra.html'} <= found


def test_nothing_comes_from_the_network(built):
    loads = re.compile(r'(?:<script[^>]*src|<link[^>]*rel="stylesheet"[^>]*href|<img[^>]*src)="(?:https?:)?//')
    for page in built[0].rglob('*.html'): assert not loads.search(page.read_text()), page


MODULES = [p.module for p in read_pages() if p.module]

@pytest.mark.parametrize('module', MODULES)
def test_every_public_name_has_an_entry_with_an_example(built, module):
    import importlib, inspect
    mod = importlib.import_module(f'rlheals.{module}')
    kinds = lambda o: inspect.isclass(o) or inspect.isfunction(inspect.unwrap(o) if callable(o) else o)
    names = [n for n in mod.__all__ if kinds(getattr(mod, n))]
    if not names: return
    page = (built[0]/'api'/f'{module}.html').read_text()
    parts = dict(re.findall(r'<h2 id="([^"]+)">(.*?)(?=<h2 |</article>)', page, re.S))
    assert [n for n in names if n not in parts] == []
    assert [
        n for n in names if not re.search(r'<p class="example">.*?<div class="[^"]*highlight', parts[n], re.S)
    ] == []
    for n in names: assert f'{n}</span>' in parts[n] or f'>{n}<' in parts[n], n  # signature, or the name in its example


def test_an_entry_without_example_is_noticed(tmp_path):
    "The check above can fail: without the cells that show something there is no example."
    pages = [p for p in read_pages() if p.module == 'stats']
    assert find_example('interval', 'stats', pages)
    pages[0].cells = [c for c in pages[0].cells if site.is_exported(c)]
    assert find_example('interval', 'stats', pages) is None


def test_a_broken_link_is_reported(built, tmp_path):
    folder = shutil.copytree(built[0], tmp_path/'site')
    page = folder/'09_sft.html'
    page.write_text(
        page.read_text().replace(
            '</article>',
            '<a href="nowhere.html">x</a><a href="index.html#nowhere">y</a><img src="nowhere.png"></article>',
        )
    )
    assert broken_links(folder) == [
        ('09_sft.html', link, why)
        for link, why in (
            ('nowhere.html', 'no such file'),
            ('index.html#nowhere', 'no such anchor'),
            ('nowhere.png', 'no such file'),
        )
    ]


def repository(folder, text):
    "A repository with an index that says `text`."
    for d in ('nbs', 'figures', 'tests'): (folder/d).mkdir(parents=True)
    nb = dict(
        cells=[dict(cell_type='markdown', id='one', metadata={}, source=f'# Home\n\n{text}')],
        metadata={},
        nbformat=4,
        nbformat_minor=5,
    )
    (folder/'nbs'/'index.ipynb').write_text(json.dumps(nb))
    (folder/'nbs'/'00_one.ipynb').write_text(json.dumps(nb))
    (folder/'nbs'/'paper').mkdir()
    (folder/'nbs'/'paper'/'00_one.ipynb').write_text(json.dumps(nb))
    return folder


@pytest.mark.parametrize(
    'text, says',
    [
        ('[gone](gone.ipynb)', 'gone.ipynb'),
        ('[gone](00_one.ipynb#gone)', 'gone'),
        ('![gone](../figures/F99.png)', 'F99.png'),
    ],
)
def test_a_notebook_with_a_broken_link_is_refused(tmp_path, text, says):
    with pytest.raises(site.SiteError, match=says):
        build_site(tmp_path / 'site', tmp_path / 'build', repository(tmp_path / 'here', text))


def test_the_command(monkeypatch, tmp_path):
    from typer.testing import CliRunner
    from rlheals.running.cli import app

    docs = lambda result: (
        monkeypatch.setattr(site, 'build_site', lambda out: result),
        CliRunner().invoke(app, ['docs', '--out', str(tmp_path)]),
    )[1]
    made = site.Site(read_pages()[:3], {}, {})
    good, bad = docs((tmp_path, made, [])), docs((tmp_path, made, [('a.html', 'b.html', 'no such file')]))
    assert good.exit_code == 0 and 'index.html' in good.output
    assert bad.exit_code == 1 and 'a.html' in bad.output and 'no such file' in bad.output


def test_missing_packages_are_named(monkeypatch, tmp_path):
    import importlib.util
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'material' else real(name))
    with pytest.raises(site.SiteError, match=r"material.*pip install -e '\.\[docs\]'"):
        build_site(tmp_path / 'site', tmp_path / 'build')
