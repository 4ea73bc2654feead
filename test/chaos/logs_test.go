package chaos

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// loss is a period with permitted loss of output from running containers (docs/logs.md).
type loss struct {
	why      string
	from, to time.Time
	bytes    int  // lost bytes per container; 0 for any number
	torn     bool // the engine may deliver the end of a line without its beginning
}

// engineBuffer is the size of an engine's buffers for a container, in bytes (docs/logs.md): a
// buffer, and the line at its border.
const engineBuffer = 32<<10 + 21<<10

// lossSlack is the tolerance between a line's time and that of a nearby loss.
const lossSlack = 3 * time.Second

// permits reports whether a loss of this size is permitted between two times.
func (l *loss) permits(from, to time.Time, bytes int) bool {
	return !l.from.After(to.Add(lossSlack)) && !l.to.Before(from.Add(-lossSlack)) && (l.bytes == 0 || bytes <= l.bytes)
}

// record is one line of output.
type record struct {
	at    time.Time
	text  string
	whole bool // the log contains its end
}

// parseLog parses a log in the CRI's format.
func parseLog(log []byte) (all []record, problems []string) {
	open := false // the last record is incomplete
	for line := range bytes.Lines(log) {
		f := strings.SplitN(strings.TrimSuffix(string(line), "\n"), " ", 4)
		if len(f) != 4 || f[1] != "stdout" || f[2] != "F" && f[2] != "P" || !bytes.HasSuffix(line, []byte("\n")) {
			problems = append(problems, fmt.Sprintf("not a line of a CRI log: %.80q", line))
			continue
		}

		at, err := time.Parse(time.RFC3339Nano, f[0])
		if err != nil {
			problems = append(problems, fmt.Sprintf("not a line of a CRI log: %v", err))
			continue
		}

		if !open {
			all = append(all, record{at: at})
		}

		last := &all[len(all)-1]
		last.text += f[3]
		last.whole = f[2] == "F"
		open = !last.whole
	}

	return all, problems
}

// numbered matches a line of a chaos container.
var numbered = regexp.MustCompile(`^line (\d+)( 0+)?$`)

// lineSize returns the size of a line in bytes; every 50th is long.
func lineSize(i int) int {
	if i%50 == 49 {
		return len(fmt.Sprintf("line %d %020000d\n", i, 0))
	}
	return len(fmt.Sprintf("line %d\n", i))
}

// parseLine returns the number of a complete line.
func parseLine(text string) (n int, ok bool) {
	m := numbered.FindStringSubmatch(text)
	if m == nil {
		return 0, false
	}
	n, err := strconv.Atoi(m[1])
	return n, err == nil && len(text)+1 == lineSize(n)
}

// checkLines checks that the log contains each line once and in order, except for permitted losses.
// noted is the last line recorded by the container, -1 for none, and notedAt its time.
func checkLines(log []byte, noted int, notedAt time.Time, losses []loss) []string {
	records, problems := parseLog(log)
	next, before, torn := 0, time.Time{}, false
	lost := func(until int, to time.Time) string {
		bytes := 0
		for i := next; i < until; i++ {
			bytes += lineSize(i)
		}

		from := before
		if from.IsZero() {
			from = to
		}

		for _, l := range losses {
			if l.permits(from, to, bytes) && (!torn || l.torn) {
				return ""
			}
		}

		return fmt.Sprintf("lines %d to %d (%d bytes, torn %v) are lost between %s and %s", next, until-1, bytes, torn,
			from.Format(time.StampMilli), to.Format(time.StampMilli))
	}

	for i, r := range records {
		n, ok := parseLine(r.text)
		if !ok || !r.whole {
			// a killed container may not have printed its last line completely
			if i < len(records)-1 || noted >= next {
				torn = true
			}
			continue
		}

		switch {
		case n < next:
			problems = append(problems, fmt.Sprintf("line %d follows line %d (%s)", n, next-1,
				r.at.Format(time.StampMilli)))
			continue

		case n > next || torn:
			if text := lost(n, r.at); text != "" {
				problems = append(problems, text)
			}
		}

		next, before, torn = n+1, r.at, false
	}

	if noted >= next || torn {
		if text := lost(noted+1, notedAt); text != "" {
			problems = append(problems, text+", at the end")
		}
	}

	return problems
}

// readLog returns a container's log with its rotated files, oldest first.
func readLog(log string) ([]byte, error) {
	rotated, err := filepath.Glob(log + ".*")
	if err != nil {
		return nil, err
	}

	slices.Sort(rotated)
	var all []byte
	for _, file := range append(rotated, log) {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		all = append(all, b...)
	}

	return all, nil
}

// wasForgotten finds containers with a start forgotten by the engine in the daemon's log.
var wasForgotten = regexp.MustCompile(`of a container without a recorded start" container=([0-9a-f]{64})`)

// forgotten returns the containers with a forgotten start. Their output was not read.
func (l *lab) forgotten() map[string]bool {
	all := map[string]bool{}
	log, _ := os.ReadFile(l.daemon.Log())
	for _, m := range wasForgotten.FindAllSubmatch(log, -1) {
		all[string(m[1])] = true
	}
	return all
}

// checkLogs checks the logs of all containers of a pod with output, except forgotten ones. It
// returns the number of printed lines.
func (p *pod) checkLogs(losses []loss, forgotten map[string]bool) (lines int, problems []string) {
	notes, err := os.ReadDir(p.stateDir())
	if err != nil {
		return 0, []string{err.Error()}
	}

	for _, e := range notes {
		file := filepath.Join(p.stateDir(), e.Name())
		b, err := os.ReadFile(file)
		info, statErr := os.Stat(file)
		if err != nil || statErr != nil {
			problems = append(problems, fmt.Sprint(err, statErr))
			continue
		}

		p.mu.Lock()
		id := p.ids[p.uid+" "+e.Name()]
		p.mu.Unlock()
		if forgotten[id] {
			continue
		}

		noted := bytes.Count(b, []byte("\n")) - 1
		name, attempt, _ := strings.Cut(e.Name(), ".")
		log := p.eng.Path(filepath.Join(p.logDir(), name, attempt+".log"))
		text, err := readLog(log)
		if err != nil && noted >= 0 {
			problems = append(problems, fmt.Sprintf("%s: %d lines printed: %v", e.Name(), noted+1, err))
			continue
		}

		lines += noted + 1
		for _, problem := range checkLines(text, noted, info.ModTime(), losses) {
			problems = append(problems, fmt.Sprintf("log of %s %s: %s", p.uid, e.Name(), problem))
		}
	}

	return lines, problems
}

// TestCheckLines checks that the log checker detects errors and accepts permitted losses.
func TestCheckLines(t *testing.T) {
	base := time.Date(2026, 1, 2, 3, 4, 0, 0, time.UTC)
	log := func(at int, tag, text string) string {
		return fmt.Sprintf("%s stdout %s %s\n", base.Add(time.Duration(at)*10*time.Second).Format(time.RFC3339Nano),
			tag, text)
	}

	first := log(0, "F", "line 0") + log(1, "F", "line 1")
	kill := loss{
		why:   "engine",
		from:  base.Add(15 * time.Second),
		to:    base.Add(15 * time.Second),
		bytes: engineBuffer,
		torn:  true,
	}

	full := loss{why: "disk", from: base.Add(12 * time.Second), to: base.Add(18 * time.Second)}
	tests := map[string]struct {
		log    string
		noted  int
		losses []loss
		wrong  bool
	}{
		"whole":             {log: first + log(2, "F", "line 2"), noted: 2},
		"not all noted":     {log: first, noted: 0},
		"in pieces":         {log: first + log(2, "P", "line ") + log(2, "F", "2"), noted: 2},
		"a gap":             {log: first + log(2, "F", "line 3"), noted: 3, wrong: true},
		"a gap when killed": {log: first + log(2, "F", "line 3"), noted: 3, losses: []loss{kill}},
		"a large gap when killed": {
			log:    first + log(2, "F", "line 9000"),
			noted:  9000,
			losses: []loss{kill},
			wrong:  true,
		},
		"a large gap, disk full": {log: first + log(2, "F", "line 9000"), noted: 9000, losses: []loss{full}},
		"a gap long before": {
			log:    first + log(9, "F", "line 2") + log(9, "F", "line 4"),
			noted:  4,
			losses: []loss{kill, full},
			wrong:  true,
		},
		"twice":                    {log: first + log(2, "F", "line 1"), noted: 1, losses: []loss{kill}, wrong: true},
		"the end is missing":       {log: first, noted: 2, wrong: true},
		"the end is missing, full": {log: first, noted: 2, losses: []loss{full}},
		"torn":                     {log: first + log(1, "F", "ne 2") + log(2, "F", "line 3"), noted: 3, wrong: true},
		"torn when killed": {
			log:    first + log(1, "F", "ne 2") + log(2, "F", "line 3"),
			noted:  3,
			losses: []loss{kill},
		},
		"torn by a full disk": {
			log:    first + log(1, "F", "ne 2") + log(2, "F", "line 3"),
			noted:  3,
			losses: []loss{full},
			wrong:  true,
		},
		"half of a line at the end": {log: first + log(2, "P", "li"), noted: 1},
		"garbage":                   {log: first + "\x00\x00\n", noted: 1, losses: []loss{kill, full}, wrong: true},
	}

	for name, c := range tests {
		t.Run(name, func(t *testing.T) {
			got := checkLines([]byte(c.log), c.noted, base.Add(20*time.Second), c.losses)
			if (len(got) > 0) != c.wrong {
				t.Errorf("%s: %q, want problems %v", name, got, c.wrong)
			}
		})
	}
}
