package main

import (
	"context"
	"embed"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

//go:embed steps
var scripts embed.FS

// step is one test of the node.
type step struct {
	name    string
	about   string
	timeout time.Duration
	// parts are the step's scripts with their arguments. The node restarts between two parts.
	parts []string
}

// all are the steps in the order of a run.
var all = []step{
	{"deb", "installs the deb with apt", 10 * time.Minute, []string{"deb"}},
	{"check", "cri-dockerd check has no findings", 5 * time.Minute, []string{"check"}},
	{"check-pod", "cri-dockerd check --pod passes", 5 * time.Minute, []string{"check-pod"}},
	{"units", "unit tests of packages that read cgroup files", 20 * time.Minute, []string{"units"}},
	{"conformance", "the conformance suite", 2 * time.Hour, []string{"conformance"}},
	{"apparmor", "AppArmor profiles", 20 * time.Minute, []string{"suite TestAppArmor"}},
	{"oom", "reasons of 200 OOM kills", time.Hour, []string{"suite TestOOMReasons -oom-kills 200"}},
	{"features", "what Docker's API lacks, by the containerd shim", 30 * time.Minute, []string{
		"suite 'TestStrictGroups|TestAmbientCapabilities|TestLimitsOfTheFirstProcess|TestMountOptions|" +
			"TestUserNamespace$|TestUserNamespaceVolumes|TestUserNamespaceRules'",
	}},
	{"checkpoint", "a checkpoint with Debian's criu", 20 * time.Minute, []string{"suite 'TestCheckpoint$'"}},
	{"psi", "pressure in the stats", 10 * time.Minute, []string{"suite TestPressure"}},
	{"limits", "limits over reloads of systemd and updates", 30 * time.Minute, []string{"suite TestLimitsAreKept"}},
	{"reboot", "pods over a restart of the node", 30 * time.Minute, []string{"reboot-before", "reboot-after"}},
	{"kubelet", "limits of a kubelet: MemoryQoS, swap, static CPUs, resize", 30 * time.Minute, []string{"kubelet"}},
	{"upgrade", "pods over an upgrade of Docker", 30 * time.Minute, []string{"upgrade false"}},
	{"upgrade-live", "the same with live-restore", 30 * time.Minute, []string{"upgrade true"}},
}

// standard are the steps of a run without a selection.
var standard = []string{
	"deb", "check", "check-pod", "units", "apparmor", "oom", "psi", "limits", "reboot", "kubelet", "conformance",
	"check-pod@cgroupfs", "oom@cgroupfs", "limits@cgroupfs", "kubelet@cgroupfs", "conformance@cgroupfs",
	"check@29", "check-pod@29", "features@29", "checkpoint@29", "apparmor@29", "oom@29", "psi@29", "limits@29",
	"reboot@29", "kubelet@29", "conformance@29", "upgrade", "upgrade-live",
}

// selection is a step on one kind of engine.
type selection struct {
	step
	engine string // 20.10 or 29
	driver string // systemd or cgroupfs
}

// String returns the selection as in the flag -steps.
func (s selection) String() string {
	name := s.name
	if s.engine != "20.10" {
		name += "@" + s.engine
	}
	if s.driver != "systemd" {
		name += "@" + s.driver
	}

	return name
}

// selectSteps parses the flag -steps. Every run installs the deb first.
func selectSteps(list string) ([]selection, error) {
	names := strings.Fields(list)
	switch {
	case list == "none":
		return nil, nil
	case len(names) == 0:
		names = standard
	case names[0] != "deb":
		names = append([]string{"deb"}, names...)
	}

	var selected []selection
	for _, name := range names {
		s, err := parseSelection(name)
		if err != nil {
			return nil, err
		}
		selected = append(selected, s)
	}

	return selected, nil
}

// parseSelection parses STEP[@ENGINE][@DRIVER].
func parseSelection(text string) (selection, error) {
	words := strings.Split(text, "@")
	s := selection{engine: "20.10", driver: "systemd"}
	for _, one := range all {
		if one.name == words[0] {
			s.step = one
		}
	}

	if s.name == "" {
		return s, fmt.Errorf("unknown step %q; the steps are:\n%s", words[0], describeSteps())
	}

	for _, w := range words[1:] {
		switch w {
		case "20.10", "29":
			s.engine = w
		case "systemd", "cgroupfs":
			s.driver = w
		default:
			return s, fmt.Errorf("step %q: %q is neither an engine (20.10, 29) nor a driver (systemd, cgroupfs)",
				text, w)
		}
	}

	return s, nil
}

// describeSteps returns a line for each step.
func describeSteps() string {
	var b strings.Builder
	for _, s := range all {
		fmt.Fprintf(&b, "  %-22s %s\n", s.name, s.about)
	}

	return b.String()
}

// runSteps runs the steps on a node and records their results. The error names the failed steps.
func runSteps(ctx context.Context, m machine, dir string, steps []selection, results *results) error {
	if len(steps) == 0 {
		return nil
	}

	files, err := newPayload(filepath.Join(dir, "payload"))
	if err != nil {
		return err
	}

	var failed []string
	for _, s := range steps {
		if results.passed(s.String()) {
			fmt.Printf("%-28s passed before\n", s)
			continue
		}

		if err := files.send(ctx, m, s); err != nil {
			return err
		}

		r := runStep(ctx, m, dir, s)
		if ctx.Err() != nil {
			return ctx.Err()
		}

		if err := results.add(r); err != nil {
			return err
		}

		fmt.Printf("%-28s %s in %s\n", s, r.Result, r.Duration())
		if r.Result == resultFailed {
			failed = append(failed, s.String())
			printTail(filepath.Join(dir, s.String()+".log"))
		}

		if s.name == "deb" && r.Result != resultPassed {
			break // nothing to test
		}
	}

	fmt.Print("\n", results.markdown())
	if failed != nil {
		return fmt.Errorf("failed steps: %s; logs are in %s", strings.Join(failed, " "), dir)
	}

	return nil
}

// runStep runs the parts of a step with their output in a log file.
func runStep(ctx context.Context, m machine, dir string, s selection) result {
	r := result{Step: s.String(), About: s.about, Begin: time.Now(), Result: resultPassed}
	if len(s.parts) > 1 && m.reboot == nil {
		r.Result, r.Note = resultNotRun, m.name+" must not be restarted"
		return r
	}

	log, err := os.Create(filepath.Join(dir, s.String()+".log"))
	if err == nil {
		defer log.Close()
		ctx, cancel := context.WithTimeout(ctx, s.timeout)
		defer cancel()
		err = runParts(ctx, m, log, s)
	}

	r.Seconds = time.Since(r.Begin).Seconds()
	if err != nil {
		r.Result, r.Note = resultFailed, err.Error()
	}

	return r
}

func runParts(ctx context.Context, m machine, log io.Writer, s selection) error {
	script := func(name string) error {
		return m.run(ctx, log, fmt.Sprintf("cd %s/steps && ENGINE=%s DRIVER=%s exec bash -eu %s", remoteDir, s.engine,
			s.driver, strings.Replace(name+" ", " ", ".sh ", 1)))
	}

	if s.name != "deb" {
		if err := script("engine"); err != nil {
			return fmt.Errorf("engine %s with driver %s: %w", s.engine, s.driver, err)
		}
	}

	for i, part := range s.parts {
		if i > 0 {
			if err := m.reboot(ctx); err != nil {
				return fmt.Errorf("restart of the node: %w", err)
			}
		}

		if err := script(part); err != nil {
			return fmt.Errorf("%s: %w", part, err)
		}
	}

	return nil
}

// printTail prints the end of a step's log.
func printTail(file string) {
	const lines = 40
	b, err := os.ReadFile(file)
	if err != nil {
		return
	}

	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	fmt.Printf("%s:\n  %s\n", file, strings.Join(all[max(0, len(all)-lines):], "\n  "))
}
