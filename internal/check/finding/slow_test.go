package finding

import (
	"regexp"
	"strings"
	"testing"
	"time"
)

// busy is the load of an overloaded node.
var busy = Load{CPUs: 2, Average: 9, CPU: 93.4, Memory: 3, IO: 61}

// slowCases returns services that respond late or not at all.
func slowCases() []broken {
	silent := func(f *Facts) {
		f.Engine = Engine{
			Problem:   Silent,
			Error:     "context deadline exceeded",
			Slow:      20 * time.Second,
			Installed: true,
			Config:    f.Engine.Config,
		}
		f.Daemon.Conditions[0] = Condition{"RuntimeReady", false, "DockerNotReady", "ping the engine"}
	}

	return []broken{
		{"engine slow", "engine", func(f *Facts) { f.Engine.Slow = 2340 * time.Millisecond }},
		{"engine slow on an overloaded node", "runtime-ready", func(f *Facts) {
			f.Engine.Slow, f.Node.Load = 9*time.Second, busy
			f.Daemon.Conditions[0] = Condition{"RuntimeReady", false, "DockerNotReady", "ping the engine: timeout"}
		}},
		{"engine hangs with live-restore", "engine", func(f *Facts) {
			silent(f)
			f.Engine.Config.Keys = map[string]any{"live-restore": true}
		}},
		{"engine hangs without live-restore", "engine", silent},
		{"engine silent on an overloaded node", "engine", func(f *Facts) { silent(f); f.Node.Load = busy }},
		{"engine stopped by a signal", "engine", func(f *Facts) {
			silent(f)
			f.Node.Load, f.Engine.Stopped = busy, 40
		}},
		{"engine accepts no connections", "engine", func(f *Facts) { silent(f); f.Engine.Slow = 0 }},
		{"engine reports an error", "engine", func(f *Facts) {
			silent(f)
			f.Engine.Problem, f.Engine.Error = Other, "get engine information: internal error"
		}},
		{"daemon slow", "daemon", func(f *Facts) { f.Daemon.Slow = 1600 * time.Millisecond }},
		{"daemon silent on an overloaded node", "daemon", func(f *Facts) {
			f.Daemon.Problem, f.Daemon.Slow, f.Node.Load = Silent, 20*time.Second, busy
		}},
		{"daemon stopped by a signal", "daemon", func(f *Facts) {
			f.Daemon.Problem, f.Daemon.Slow, f.Daemon.Stopped = Silent, 4*time.Second, 50
		}},
		{"log-driver slow", "log-driver", func(f *Facts) { f.Logs.Slow = 5 * time.Second }},
		{"log-driver silent on an overloaded node", "log-driver", func(f *Facts) {
			f.Logs.Problem, f.Logs.Slow, f.Node.Load = Silent, 20*time.Second, busy
		}},
		{"log-driver stopped by a signal", "log-driver", func(f *Facts) {
			f.Logs.Problem, f.Logs.Slow, f.Logs.Stopped = Silent, 4*time.Second, 60
		}},
	}
}

// TestSlowIsNotHung checks that no fix for a slow service, or for a silent one on an overloaded
// node, restarts or kills anything.
func TestSlowIsNotHung(t *testing.T) {
	harmful := regexp.MustCompile(`systemctl|service |kill|rm `)
	tested := 0
	for _, c := range slowCases() {
		if !strings.Contains(c.name, "slow") && !strings.Contains(c.name, "overloaded") {
			continue
		}

		tested++
		t.Run(c.name, func(t *testing.T) {
			f := healthy()
			c.do(f)
			for _, x := range Evaluate(f) {
				if harmful.MatchString(x.Fix.String()) {
					t.Errorf("%s %s: %s: fix %s", x.Status, x.ID, x.Detail, x.Fix)
				}
			}
		})
	}

	if tested != 7 {
		t.Errorf("%d cases were tested, want 7", tested)
	}
}

func TestOverload(t *testing.T) {
	for name, c := range map[string]struct {
		load Load
		want string
	}{
		"idle":                   {Load{CPUs: 2}, ""},
		"unknown":                {Load{}, ""},
		"busy, not overloaded":   {Load{CPUs: 2, Average: 8, CPU: 60, Memory: 20, IO: 60}, ""},
		"CPU":                    {Load{CPUs: 2, Average: 99, CPU: 60.6}, "CPU pressure 61 %"},
		"memory":                 {Load{CPUs: 2, Memory: 21}, "memory pressure 21 %"},
		"all":                    {busy, "CPU pressure 93 %, I/O pressure 61 %"},
		"kernel without PSI":     {Load{CPUs: 2, Average: 8.1}, "load average 8.1"},
		"unknown number of CPUs": {Load{Average: 4.1}, "load average 4.1"},
	} {
		t.Run(name, func(t *testing.T) {
			f := &Facts{Node: Node{Load: c.load}}
			want := c.want
			if want != "" {
				want = "the node is overloaded (" + want + ")"
			}
			if got := f.overload(); got != want {
				t.Errorf("overload %q, want %q", got, want)
			}
		})
	}
}
