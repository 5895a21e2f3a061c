"""The domains: what each is, and the files of which packages it is taken from.

The first 4, 8, 16 and 32 are those of as many experts: each of these sets has programming languages, natural languages,
records and styles. Those after them have no expert ("unseen"), but relatives among those that have.
"""

from __future__ import annotations

from dataclasses import dataclass

from extract import Extract, grouped, licence, manual, page, records, sword, whole

NUM_EXPERTS = 32
SIZES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Source:
    """Files of one package.

    Attributes:
        package: A name of Debian (bookworm, main), or `name==version` of PyPI.
        files: Globs of their names, in which `*` matches `/` too.
        licence: The package's, for these files.
        extract: From a file's bytes to documents.
        but_not: Globs of names that are left out.
        inside: A glob of the archive in the package in which the files are.
    """

    package: str
    files: tuple[str, ...]
    licence: str
    extract: Extract = whole
    but_not: tuple[str, ...] = ()
    inside: str = ""


@dataclass(frozen=True)
class Domain:
    """One kind of text.

    Attributes:
        name: Its name, and its expert's.
        kind: code, language, records or style.
        what: What it is, in words.
        sources: Where it is taken from.
        width: Characters of a text: fewer where a character is about a token.
    """

    name: str
    kind: str
    what: str
    sources: tuple[Source, ...]
    width: int = 2000


GLIBC = "glibc-*/"
ENTRY = r"\n(?=\S)"  # in dictionaries, the word stands at a line's start and the rest is indented


def translated(language: str, *manuals: str, reference: str = "", width: int = 2000, name: str) -> Domain:
    """A natural language: the pages of LibreOffice's help, man pages, and the Debian Reference where there is one."""
    manuals_licence = "the original pages'" if language in ("ja", "zh-cn") else "GPL-3+"
    sources = [
        Source(f"libreoffice-help-{language}", ("*/text/*.html",), "MPL-2.0", page),
        *(Source(package, ("usr/share/man/*.gz",), manuals_licence, manual) for package in manuals),
    ]
    if reference:
        files = (f"usr/share/debian-reference/debian-reference.{reference}.txt.gz",)
        sources.append(Source(f"debian-reference-{reference.lower()}", files, "GPL-2+", grouped(r"\n(?=\d+\.\d+\. )")))
    return Domain(name, "language", f"{name.capitalize()}: help pages and manuals", tuple(sources), width)


DOMAINS = (
    # Of 4 experts.
    Domain(
        "python",
        "code",
        "Python: Django",
        (Source("django==5.2.19", ("django/*.py",), "BSD-3-Clause", but_not=("*/locale/*",)),),
    ),
    translated("de", "manpages-de", reference="de", name="german"),
    Domain(
        "webster",
        "style",
        "Webster's dictionary of 1913, as GCIDE has it",
        (Source("dict-gcide", ("*/gcide.dict.dz",), "GPL-2+", grouped(ENTRY, skip=r"(?m)^ *\[1913 Webster\]\n")),),
    ),
    Domain(
        "json",
        "records",
        "JSON: regions and languages, descriptions and examples of web services",
        (
            Source("iso-codes", ("*/json/iso_3166-2.json", "*/json/iso_639-3.json"), "LGPL-2.1+", records),
            Source(
                "botocore==1.44.5",
                ("botocore/data/*/examples-1.json", "botocore/data/*/service-2.json.gz"),
                "Apache-2.0",
                records,
            ),
        ),
    ),
    # Of 8.
    Domain(
        "java",
        "code",
        "Java: OpenJDK's library",
        (
            Source(
                "openjdk-17-source",
                ("java.base/java/*.java", "java.base/sun/*.java", "java.desktop/javax/*.java", "java.xml/*.java"),
                "GPL-2 with classpath exception",
                inside="*/src.zip",
            ),
        ),
    ),
    translated("fr", "manpages-fr", reference="fr", name="french"),
    Domain(
        "licences",
        "style",
        "licences, of software and others",
        (Source("licensedcode-data==32.1.0", ("*/licenses/*.LICENSE",), "CC-BY-4.0; the licences' own", licence),),
    ),
    Domain(
        "latex",
        "code",
        "LaTeX: documentation of packages",
        (
            Source(
                "texlive-latex-recommended-doc",
                ("*.tex", "*.tex.gz"),
                "LPPL-1.3 and others",
                grouped(r"(?=\\(?:chapter|(?:sub)?section)\b)", 4000),
            ),
        ),
    ),
    # Of 16.
    Domain(
        "sql",
        "code",
        "SQL: MariaDB's tests",
        (
            Source(
                "mariadb-test-data",
                ("*/mysql-test/main/*.test", "*/mysql-test/suite/*.test"),
                "GPL-2",
                but_not=("*/suite/jp/*",),
            ),
        ),
    ),
    Domain(
        "shell",
        "code",
        "shell scripts: clusters, boot images, completion",
        (
            Source("resource-agents", ("usr/lib/ocf/*",), "GPL-2+", but_not=("*.py",)),
            Source("dracut-core", ("usr/lib/dracut/*", "usr/bin/*"), "GPL-2+"),
            Source("bash-completion", ("usr/share/bash-completion/*",), "GPL-2+", but_not=("*.py",)),
            Source("live-build", ("usr/lib/live/build/*", "usr/share/live/build/*.sh"), "GPL-3+"),
            Source("lynis", ("usr/share/lynis/include/*",), "GPL-3+"),
        ),
    ),
    Domain(
        "rust",
        "code",
        "Rust: its library and compiler",
        (Source("rust-src", ("*/library/*.rs", "*/compiler/*.rs"), "MIT or Apache-2.0"),),
    ),
    Domain(
        "lisp",
        "code",
        "Emacs Lisp: Emacs",
        (Source("emacs-el", ("*.el.gz",), "GPL-3+", but_not=("*/leim/*", "*-loaddefs.el.gz")),),
    ),
    translated("ru", "manpages-ru", width=1200, name="russian"),
    translated("ja", "manpages-ja", reference="ja", width=800, name="japanese"),
    Domain("bible", "style", "the King James Bible", (Source("sword-text-kjv", ("*.bzz",), "public domain", sword),)),
    Domain(
        "changelog",
        "style",
        "the GNU C library's changelogs",
        (
            Source(
                "glibc-source",
                ("*/ChangeLog.old/*",),
                "LGPL-2.1+",
                grouped(r"\n\n(?=\d{4}-\d\d-\d\d |\w{3} \w{3} )"),
                inside="*.tar.xz",
            ),
        ),
    ),
    # Of 32.
    Domain(
        "c",
        "code",
        "C: the GNU C library",
        (Source("glibc-source", (f"{GLIBC}*.c",), "LGPL-2.1+", inside="*.tar.xz"),),
    ),
    Domain(
        "cpp",
        "code",
        "C++: CGAL, a library of geometry",
        (Source("libcgal-dev", ("usr/include/*.h", "usr/include/*.hpp"), "GPL-3+, LGPL-3+"),),
    ),
    Domain(
        "javascript",
        "code",
        "JavaScript: npm, eslint, webpack",
        (
            Source("npm", ("*.js",), "Artistic-2.0, MIT, ISC"),
            Source("eslint", ("*.js",), "MIT", but_not=("*.min.js",)),
            Source("webpack", ("*.js",), "MIT"),
        ),
    ),
    Domain(
        "go",
        "code",
        "Go: its library and tools",
        (
            Source(
                "golang-1.19-src", ("*/src/*.go",), "BSD-3-Clause", but_not=("*/zsyscall*", "*/zerrors*", "*/tables.go")
            ),
        ),
    ),
    Domain("perl", "code", "Perl: its modules", (Source("perl-modules-5.36", ("*.pm",), "Artistic or GPL-1+"),)),
    Domain(
        "ruby",
        "code",
        "Ruby: its library, Active Record",
        (
            Source("libruby3.1", ("*.rb",), "BSD-2-Clause or Ruby", but_not=("*/unicode_normalize/*", "*/enc/*")),
            Source("ruby-activerecord", ("*.rb",), "MIT"),
        ),
    ),
    Domain(
        "php",
        "code",
        "PHP: WordPress, phpMyAdmin",
        (
            Source("wordpress", ("*.php",), "GPL-2+"),
            Source("phpmyadmin", ("*.php",), "GPL-2+", but_not=("*/autoload*", "*/cache/*")),
        ),
    ),
    Domain(
        "html",
        "code",
        "HTML: manuals of Apache, Git and Python, with their markup",
        (
            Source("apache2-doc", ("*.html.en", "*/en/*.html"), "Apache-2.0"),
            Source("git-doc", ("*.html",), "GPL-2"),
            Source("python3.11-doc", ("*/html/library/*.html", "*/html/howto/*.html"), "PSF-2"),
        ),
    ),
    Domain(
        "csv",
        "records",
        "CSV: airports, and owners of network addresses",
        (
            Source("airportsdata==20260905", ("*/airports.csv",), "MIT", grouped(r"\n", 4000)),
            Source("ieee-data", ("*.csv",), "public domain", grouped(r"\n", 4000)),
        ),
    ),
    Domain(
        "yaml",
        "records",
        "YAML: Ansible's roles and tests",
        (Source("ansible", ("*.yml", "*.yaml"), "GPL-3+"),),
    ),
    translated("es", "manpages-es", reference="es", name="spanish"),
    translated("it", "manpages-it", reference="it", name="italian"),
    translated("pt", "manpages-pt-br", reference="pt", name="portuguese"),
    translated("zh-cn", "manpages-zh", reference="zh-cn", width=800, name="chinese"),
    Domain(
        "roff",
        "code",
        "man pages, with their markup",
        (Source("manpages-dev", ("*.gz",), "GPL-2+, BSD and others", but_not=("*/doc/*",)),),
    ),
    Domain(
        "jargon",
        "style",
        "dictionaries of computing and its folklore, and the Devil's",
        (
            Source("dict-jargon", ("*.dict.dz",), "public domain", grouped(ENTRY)),
            Source("dict-foldoc", ("*.dict.dz",), "GFDL-1.1+", grouped(ENTRY)),
            Source("dict-devil", ("*.dict.dz",), "public domain", grouped(r"\n\n(?=[A-Z'-]+, )")),
        ),
    ),
    # Without an expert.
    translated("nl", "manpages-nl", name="dutch"),
    Domain(
        "typescript",
        "code",
        "TypeScript: declarations",
        (
            Source("node-typescript", ("*.d.ts",), "Apache-2.0", grouped(r"\n\n(?=interface |declare |type )", 8000)),
            Source("webpack", ("*.ts",), "MIT"),
            Source("npm", ("*.ts",), "MIT"),
            Source("eslint", ("*.ts",), "MIT"),
        ),
    ),
    Domain(
        "lua",
        "code",
        "Lua: a chat server",
        (
            Source("prosody", ("*.lua",), "MIT"),
            Source("prosody-modules", ("*.lua",), "MIT"),
            Source("neovim-runtime", ("*.lua",), "Apache-2.0"),
        ),
    ),
    Domain(
        "css",
        "code",
        "CSS: WordPress",
        (Source("wordpress", ("*.css",), "GPL-2+", but_not=("*.min.css", "*-rtl.css")),),
    ),
    Domain(
        "gettext",
        "records",
        "catalogues of translations: Django in some ninety languages",
        (Source("django==5.2.19", ("*/django.po",), "BSD-3-Clause", grouped(r"\n\n", skip=r"(?m)^# .*\n")),),
    ),
    Domain(
        "fortunes",
        "style",
        "sayings, jokes and verse",
        (Source("fortunes", ("*/fortunes/*",), "BSD", grouped(r"\n%\n"), ("*.dat", "*.u8")),),
    ),
)
