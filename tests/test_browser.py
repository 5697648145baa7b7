"""The notebooks as a reader meets them: opened in JupyterLab, run from its menu, looked at.

Needs a Chromium on this machine; no browser is downloaded."""
import base64, hashlib, json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
TOKEN = 'tests-only'
PATIENCE = 600  # seconds for a notebook to run, on a machine that is busy with other things
NAMES = ('chromium', 'chromium-browser', 'google-chrome')
CHROMIUM = os.environ.get('RLHEALS_BROWSER') or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]

playwright = pytest.importorskip('playwright.sync_api', reason="playwright is not installed: pip install -e '.[test]'")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not CHROMIUM,
        reason=f'no Chromium: none of {", ".join(NAMES)} is on PATH (apt-get install chromium), and RLHEALS_BROWSER '
               'names none',
    ),
]


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the notebooks and the published figures: nothing that is done in the browser reaches the checkout."
    to = tmp_path_factory.mktemp('browser')
    names = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', 'nbs', 'figures', 'settings.ini'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for n in names:
        if (ROOT/n).is_file():
            (to/n).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT/n, to/n)
    (to/'rlheals').mkdir()  # where an export from a notebook goes
    return to


@pytest.fixture(scope='module')
def shots(tmp_path_factory):
    "Where screenshots go: RLHEALS_SCREENSHOTS, or a temporary directory."
    folder = Path(os.environ.get('RLHEALS_SCREENSHOTS') or tmp_path_factory.mktemp('screenshots'))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope='module')
def server(copy, tmp_path_factory):
    "JupyterLab on the copy, with settings of its own: its address."
    own = tmp_path_factory.mktemp('jupyter')
    news = own/'settings'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False)))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(
        HF_HUB_OFFLINE='1',
        JUPYTERLAB_SETTINGS_DIR=str(own / 'settings'),
        JUPYTERLAB_WORKSPACES_DIR=str(own / 'workspaces'),
        JUPYTER_CONFIG_DIR=str(own / 'config'),
        JUPYTER_RUNTIME_DIR=str(own / 'runtime'),
        IPYTHONDIR=str(own / 'ipython'),
    )
    with (own/'log').open('w') as log:
        process = subprocess.Popen(
            [
                sys.executable,
                '-m',
                'jupyterlab',
                '--no-browser',
                '--allow-root',
                '--ip=127.0.0.1',
                f'--port={port}',
                '--ServerApp.port_retries=0',
                f'--IdentityProvider.token={TOKEN}',
                f'--ServerApp.root_dir={copy}',
            ],
            cwd=copy,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    address = f'http://127.0.0.1:{port}'
    try:
        until(lambda: process.poll() is not None or ask(address, 'api/status'), 120, 'JupyterLab answers')
        assert process.poll() is None, (own/'log').read_text()[-3000:]
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope='module')
def page(server):
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(viewport=dict(width=1400, height=1000))
        browser.close()


def until(done, seconds, what):
    "Wait until `done()` gives something, and return it."
    end = time.time() + seconds
    while time.time() < end:
        if found := done(): return found
        time.sleep(.3)
    raise AssertionError(f'waited {seconds} s until {what}')


def ask(address, path):
    "What the server says at a path of its interface, or None while it does not answer."
    try:
        return json.load(
            urllib.request.urlopen(
                urllib.request.Request(f'{address}/{path}', headers=dict(Authorization=f'token {TOKEN}')), timeout=10
            )
        )
    except OSError:
        return None


def open_and_run(page, server, copy, notebook):
    "Open a notebook in JupyterLab and run all its cells from the menu; the notebook as it was saved afterwards."
    page.goto(f'{server}/lab/tree/{notebook}?token={TOKEN}&reset')
    page.wait_for_selector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell', timeout=120_000)
    kernel = until(
        lambda: next(
            (
                s['kernel']
                for s in ask(server, 'api/sessions') or []
                if s['path'] == notebook and s['kernel']['execution_state'] == 'idle'
            ),
            None,
        ),
        120,
        'the kernel is ready',
    )
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=120_000)
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()

    def finished():  # everything counted, and saved so
        if ask(server, f'api/kernels/{kernel["id"]}')['execution_state'] != 'idle': return None
        page.keyboard.press('Control+s')
        time.sleep(.5)
        code = [c for c in json.loads((copy/notebook).read_text())['cells'] if c['cell_type'] == 'code']
        return (
            code
            if all(c['execution_count'] for c in code)
            or any(o['output_type'] == 'error' for c in code for o in c['outputs'])
            else None
        )

    return until(finished, PATIENCE, f'{notebook} is done')


def sound(page, code):
    "No error in the saved outputs, nor on the page; there are outputs."
    outputs = [o for c in code for o in c['outputs']]
    assert outputs and not [o for o in outputs if o['output_type'] == 'error'], [
        o for o in outputs if o['output_type'] == 'error'
    ][:1]
    assert not page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]').count()
    return outputs


def test_a_library_notebook_runs(page, server, copy, shots):
    code = open_and_run(page, server, copy, 'nbs/1_tasks/06_general_points.ipynb')
    page.screenshot(path=shots/'library.png')
    assert len(sound(page, code)) >= 2


def test_a_chain_notebook_runs(page, server, copy, shots):
    path = copy/'nbs'/'paper'/'01_sft.ipynb'
    nb = json.loads(path.read_text())
    [cell] = [c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    cell['source'] = ''.join(cell['source']).replace("profile = 'tiny'", "profile = 'smoke'")
    path.write_text(json.dumps(nb))
    code = open_and_run(page, server, copy, 'nbs/paper/01_sft.ipynb')
    page.screenshot(path=shots/'chain.png')
    assert any('ood, step 4' in ''.join(o.get('text', '')) for o in sound(page, code))
    assert list((path.parent/'runs'/'smoke').rglob('sft-000004/model.safetensors'))


def test_the_explorer_follows_its_widgets(page, server, copy, shots):
    code = open_and_run(page, server, copy, 'nbs/pages/explorer.ipynb')
    sound(page, code)
    picture, heading = (
        page.locator('.jp-OutputArea img.widget-image').first,
        page.locator('.widget-html-content b').first,
    )
    picture.scroll_into_view_if_needed()
    page.screenshot(path=shots/'explorer.png')

    # the picture's own bytes; address and fetch in one step of the page, for the widget drops an address with the
    # next picture
    def seen():
        data = picture.evaluate(
            'async e => btoa(Array.from(new Uint8Array(await (await fetch(e.src)).arrayBuffer()), x => '
            'String.fromCharCode(x)).join(""))'
        )
        return hashlib.sha256(base64.b64decode(data)).hexdigest()

    def changes(act, name, says=''):
        was, title, start = seen(), heading.inner_text(), time.time()
        act()
        until(
            lambda: seen() != was and says in heading.inner_text(),
            60,
            f'the picture follows {name}, under a heading with "{says}"',
        )
        print(f'{name}: {1000 * (time.time() - start):.0f} ms until the browser was seen to show it')
        page.screenshot(path=shots/f'explorer-{name}.png')
        assert heading.inner_text() != title or not says

    slider = page.locator('.widget-slider .noUi-handle').first
    changes(lambda: slider.press('ArrowRight'), 'checkpoint', 'SFT, step')
    changes(lambda: page.locator('.widget-toggle-button', has_text='RL').click(), 'stage', 'RL from step')
    kinds = page.locator('.widget-dropdown select')
    changes(lambda: kinds.nth(2).select_option('v_proj'), 'matrix')
    changes(lambda: kinds.nth(0).select_option('Rank'), 'task', 'Rank')
    assert heading.inner_text().startswith('Rank')
