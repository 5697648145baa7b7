"""The site: every notebook has a page, no link leads nowhere; and every public name has an example in its chapter."""
import ast, json, re, symtable
from functools import partial
from html import unescape
from urllib.parse import unquote, urlsplit
import pytest
from typer.testing import CliRunner
from rlheals.core.environment import ROOT
from rlheals.running import site
from rlheals.running.command_line import app
import rlheals.running.commands_results  # adds `docs` to the commands

NOTEBOOKS = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]


def test_there_are_notebooks(): assert len(NOTEBOOKS) > 100


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The directory of the site."
    return site.build_site(tmp_path_factory.mktemp('docs')/'site')


@pytest.fixture(scope='module')
def pages(built):
    "Page -> its HTML."
    return {p.relative_to(built).as_posix(): p.read_text() for p in sorted(built.rglob('*.html'))}


def test_every_notebook_and_module_has_a_page(pages):
    for path in NOTEBOOKS:
        page = path.relative_to(ROOT/'nbs').with_suffix('.html').as_posix()
        assert page in pages
        assert (f'reference/{page}' in pages) == bool(exported(path)), page


def test_links_and_figures_are_there(built, pages):
    "MkDocs checked the links before; here every page is read as it came out, the menu included."
    links = re.compile(r'<(?:a|img|link|script)\b[^>]*?\s(?:href|src)="([^"]+)"')
    seen, broken = set(), []
    for name, text in pages.items():
        for link in map(unescape, set(links.findall(text))):
            to = urlsplit(link)
            if to.scheme or to.netloc or not to.path: continue
            target = built/to.path[1:] if to.path.startswith('/') else (built/name).parent/unquote(to.path)
            seen.add(target.resolve())
            if not target.is_file(): broken.append((name, link))
    assert not broken
    figures = {(built/p.relative_to(ROOT)).resolve() for p in (ROOT/'figures').glob('F*.png')}
    assert len(figures) >= 14 and figures <= seen and len(seen) > 2 * len(NOTEBOOKS)


def test_nothing_comes_from_other_hosts(pages):
    loads = re.compile(r'<(?:script|img|iframe|source)\b[^>]*?\ssrc="((?:https?:)?//[^"]+)"'
                       r'|<link\b(?![^>]*rel="canonical")[^>]*?\shref="((?:https?:)?//[^"]+)"|@import|\bimport\(')
    assert {name: m[0] for name, text in pages.items() if (m := loads.search(text))} == {}


def test_the_menu_follows_the_parts(pages):
    "Folder names without numbers; each chapter leads to the next."
    tabs = [t.strip() for t in re.findall(r'class="md-tabs__link">\s*(.*?)\s*</a>', pages['index.html'], re.S)]
    parts = [p.name[2:].capitalize() for p in sorted((ROOT/'nbs').glob('[0-9]_*'))]
    assert len(parts) == 7 and [t for t in tabs if t in parts] == parts
    assert tabs[0] == 'rlheals' and tabs[-3:] == ['Pages', 'Paper', 'Reference']
    chapters = [p.relative_to(ROOT/'nbs').with_suffix('.html') for p in sorted((ROOT/'nbs').glob('[0-9]_*/*.ipynb'))]
    for here, there in zip(chapters, chapters[1:]):
        following = re.search(r'<a href="([^"]+)" class="md-footer__link md-footer__link--next"', pages[str(here)])
        assert (ROOT/here.parent/following[1]).resolve() == ROOT/there


def test_a_page_shows_code_and_no_directives(pages):
    ppo = re.sub('<.*?>', '', pages['2_training/17_ppo.html'])
    assert 'def gae(' in ppo and 'nbdev_export' not in ppo and '<math' in pages['2_training/17_ppo.html']
    code = re.compile(r'<pre><code>(?:<span></span>)?<span class="c1">#\|')
    assert [name for name, text in pages.items() if code.search(text)] == []
    assert 'Markdown(gallery(' not in re.sub('<.*?>', '', pages['gallery.html'])  # `#| echo: false`
    assert 'src="figures/F1.png"' in pages['gallery.html']


def test_a_reference_has_what_the_comments_say(pages):
    text = pages['reference/2_training/17_ppo.html']
    assert 'id="rlheals.training.ppo.gae"' in text and 'turns by environments' in text
    assert 'href="../../2_training/17_ppo.html"' in text
    assert 'href="../reference/2_training/17_ppo.html"' in pages['2_training/17_ppo.html']


def test_search_finds_words_of_a_chapter_and_of_the_reference(built):
    index = json.loads((built/'search'/'search_index.json').read_text())
    found = {d['location'].split('#')[0] for d in index['docs'] if 'principal angles' in d['text'].lower()}
    assert '3_analysis/07_rotation.html' in found and any(f.startswith('reference/3_analysis') for f in found)


def docs(out): return CliRunner().invoke(app, ['docs', '--out', str(out)])


def test_the_command_names_the_page_and_the_broken_link(tmp_path, monkeypatch):
    "Of a small repository: a file, an anchor and a picture that are not there, and one link that works."
    for name in ('figures', 'tests', 'rlheals', 'mkdocs.yml'): (tmp_path/name).symlink_to(ROOT/name)
    text = ('# Home\n\n[gone](gone.ipynb) [lost](paper/one.ipynb#Lost) ![F99](../figures/F99.png) '
            '[fine](paper/one.ipynb#One-page)')
    for name, source in (('index', text), ('paper/one', '# One\n\n## One page')):
        (tmp_path/'nbs'/name).parent.mkdir(parents=True, exist_ok=True)
        cell = dict(cell_type='markdown', id='one', metadata={}, source=source)
        notebook = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)
        (tmp_path/'nbs'/f'{name}.ipynb').write_text(json.dumps(notebook))
    monkeypatch.setattr(site, 'build_site', partial(site.build_site, root=tmp_path))
    done = docs(tmp_path/'site')
    said = [line for line in done.output.splitlines() if 'index.ipynb' in line]
    assert done.exit_code == 1 and len(said) == 3, done.output
    for link in ('gone.ipynb', 'one.ipynb#lost', 'figures/F99.png'): assert any(link in line for line in said), link


def test_missing_packages_are_named_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(site, 'find_spec', lambda name: name != 'mkdocs_jupyter')
    done = docs(tmp_path/'site')
    assert done.exit_code == 1 and done.output.strip() == (
        "error: the site needs mkdocs_jupyter: pip install -e '.[docs]'")


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path/'letter.txt').touch()
    done = docs(tmp_path)
    assert done.exit_code == 1 and 'choose another directory' in done.output and (tmp_path/'letter.txt').exists()


def sources(path):
    "Its code cells."
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']


def exported(path):
    "The module that a notebook exports, or nothing."
    return next((m[1] for s in sources(path) if (m := re.match(r'#\| default_exp (\S+)', s))), '')


CHAPTERS = {m: p for p in NOTEBOOKS if (m := exported(p))}


def used(source):
    "The global names that code uses, and the attributes of names: `load_task`, `tasks.load_task`."
    def look(table):
        names = {s.get_name() for s in table.get_symbols() if s.is_referenced()
                 and (not s.is_assigned() if table.get_type() == 'module' else s.is_global())}
        return names.union(*map(look, table.get_children()))

    try: tree = ast.parse(source)
    except SyntaxError: return set()  # a cell with magics
    attributes = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name))
    return look(symtable.symtable(source, 'cell', 'exec')) | {f'{n.value.id}.{n.attr}' for n in attributes}


def without_example(module, cells):
    """The public names of a module that no other cell of its chapter uses. Constants need no example, and a command of
    `rlheals` is shown where it is typed."""
    tree = ast.parse((ROOT/'rlheals'/f'{module.replace(".", "/")}.py').read_text())
    public = next((ast.literal_eval(n.value) for n in tree.body
                   if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__'), [])
    commands = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)
                and any('app.command' in ast.unparse(d) for d in n.decorator_list)}
    shown = set().union(*(used(c) for c in cells if not re.search(r'^#\| *(export|default_exp)', c, re.M)))
    text = ''.join(p.read_text() for p in [ROOT/'README.md', *NOTEBOOKS])
    has_example = lambda n: ({n, f'{module.split(".")[-1]}.{n}'} & shown or n == n.upper()
                             or n in commands and re.search(rf'rlheals {n.replace("_", "-")}\b', text))
    return [n for n in public if not has_example(n)]


def test_there_are_chapters(): assert len(CHAPTERS) > 90


@pytest.mark.parametrize('module', CHAPTERS)
def test_every_public_name_has_an_example_in_its_chapter(module):
    assert without_example(module, sources(CHAPTERS[module])) == []


def test_a_name_without_example_is_noticed():
    "The check above can fail: a word in a string, or a local variable of the same name, is no use."
    module = 'analysis.statistics'
    cells = [s for s in sources(CHAPTERS[module]) if s.startswith('#| export')]
    assert 'interval' in without_example(module, [*cells, 'print("interval")', 'interval = 1; print(interval)'])
    assert 'interval' not in without_example(module, [*cells, 'interval([1, 2])'])
