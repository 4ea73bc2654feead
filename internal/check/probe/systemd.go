package probe

import (
	"path/filepath"
	"slices"
	"strings"
)

// word is a word of a command line and the file it comes from.
type word struct{ text, file string }

// unitDirs returns systemd's unit directories in order of precedence (systemd.unit(5)).
func unitDirs() []string {
	return []string{
		"/etc/systemd/system",
		"/run/systemd/system",
		"/usr/local/lib/systemd/system",
		"/usr/lib/systemd/system",
		"/lib/systemd/system",
	}
}

// unitFiles returns the files of a unit: the unit's own file, then its drop-ins in name order, each
// name once.
func (p *Prober) unitFiles(unit string) []string {
	var files []string
	dropIns := map[string]string{}
	for _, dir := range unitDirs() {
		if file := dir + "/" + unit; len(files) == 0 && p.exists(file) {
			files = append(files, file)
		}

		for _, file := range p.glob(dir + "/" + unit + ".d/*.conf") {
			if name := filepath.Base(file); dropIns[name] == "" {
				dropIns[name] = file
			}
		}
	}

	if len(files) == 0 {
		return nil
	}

	var names []string
	for name := range dropIns {
		names = append(names, name)
	}

	slices.Sort(names)
	for _, name := range names {
		files = append(files, dropIns[name])
	}

	return files
}

// setting is a key and value of a unit.
type setting struct{ key, value, file string }

// settings returns the settings of a unit in systemd's order, with continuation lines joined.
func (p *Prober) settings(unit string) []setting {
	var out []setting
	files := p.unitFiles(unit)
	for _, file := range files[:min(len(files), maxFiles)] {
		for line := range strings.Lines(strings.ReplaceAll(p.read(file), "\\\n", " ")) {
			key, value, found := strings.Cut(strings.TrimSpace(line), "=")
			if found && !strings.HasPrefix(key, "#") && !strings.HasPrefix(key, ";") {
				out = append(out, setting{strings.TrimSpace(key), strings.TrimSpace(value), file})
			}
		}
	}

	return out
}

// command returns the command line of a unit's last ExecStart with its environment variables
// expanded (systemd.exec(5), systemd.service(5)), nil without a unit.
func (p *Prober) command(unit string) []word {
	env := map[string][]word{}
	var start setting
	for _, s := range p.settings(unit) {
		switch s.key {
		case "ExecStart":
			start = s
		case "Environment":
			if s.value == "" {
				clear(env)
			}
			for _, assignment := range split(s.value) {
				setVariable(env, assignment, s.file)
			}

		case "EnvironmentFile":
			file := strings.TrimPrefix(s.value, "-")
			for _, w := range p.environmentFile(file) {
				setVariable(env, w, file)
			}
		}
	}

	var out []word
	for _, w := range split(strings.TrimLeft(start.value, "@-:+!|")) {
		name, isVariable := strings.CutPrefix(w, "$")
		if !isVariable {
			out = append(out, word{w, start.file})
			continue
		}
		out = append(out, env[strings.Trim(name, "{}")]...)
	}

	return out
}

func setVariable(env map[string][]word, assignment, file string) {
	name, value, _ := strings.Cut(assignment, "=")
	env[name] = nil
	for _, w := range split(value) {
		env[name] = append(env[name], word{w, file})
	}
}

// environmentFile returns the assignments of an environment file without the quotes of their
// values.
func (p *Prober) environmentFile(file string) []string {
	var out []string
	for line := range strings.Lines(strings.ReplaceAll(p.read(file), "\\\n", " ")) {
		name, value, found := strings.Cut(strings.TrimSpace(line), "=")
		if found && !strings.HasPrefix(name, "#") && !strings.HasPrefix(name, ";") {
			out = append(out, strings.TrimSpace(name)+"="+strings.Trim(strings.TrimSpace(value), `"'`))
		}
	}

	return out
}

// split splits a string at spaces outside of quotes and removes the quotes.
func split(s string) []string {
	var out []string
	var word strings.Builder
	quote, inWord := rune(0), false
	for _, r := range s {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote == 0 && (r == '"' || r == '\''):
			quote, inWord = r, true
		case quote == 0 && (r == ' ' || r == '\t'):
			if inWord {
				out = append(out, word.String())
			}
			word.Reset()
			inWord = false

		default:
			word.WriteRune(r)
			inWord = true
		}
	}

	if inWord {
		out = append(out, word.String())
	}

	return out
}

// isEnabled reports whether systemd starts a unit at boot: another unit wants or requires it.
func (p *Prober) isEnabled(unit string) bool {
	for _, dir := range unitDirs() {
		if len(p.glob(dir+"/*.wants/"+unit)) > 0 || len(p.glob(dir+"/*.requires/"+unit)) > 0 {
			return true
		}
	}
	return false
}
