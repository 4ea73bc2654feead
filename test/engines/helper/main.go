// Command helper runs inside the namespaces of test engines. As "init" it is their process 1 and
// ends with the test process. Under the name runc it wraps the real runc, for machines without
// CAP_SYS_RESOURCE: there, no container could get the capability, a negative oom_score_adj, or
// higher limits than the test itself.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
)

// runc is the path of the real program, set at build time.
var runc = "/usr/sbin/runc"

func main() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		runInit()
		return
	}

	if err := fixBundle(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "runc wrapper:", err)
		os.Exit(1)
	}

	err := syscall.Exec(runc, append([]string{"runc"}, os.Args[1:]...), os.Environ())
	fmt.Fprintln(os.Stderr, "runc wrapper:", err)
	os.Exit(1)
}

// runInit reaps orphans and ends when standard input ends, that is, when the process that started
// the engine has exited. The kernel then kills all processes in the PID namespace.
func runInit() {
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	go func() {
		for range children {
			for {
				if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
					break
				}
			}
		}
	}()

	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// fixBundle edits the bundle runc is about to run.
func fixBundle(args []string) error {
	i := slices.IndexFunc(args, func(a string) bool { return a == "create" || a == "run" || a == "exec" })
	if i < 0 {
		return nil
	}

	if args[i] == "exec" {
		if file := option(args[i:], "--process", "-p"); file != "" {
			return edit(file, func(p map[string]any) map[string]any { return p })
		}
		return nil
	}

	dir := option(args[i:], "--bundle", "-b")

	return edit(filepath.Join(dir, "config.json"), func(c map[string]any) map[string]any {
		p, _ := c["process"].(map[string]any)
		return p
	})
}

func option(args []string, names ...string) string {
	for i, a := range args[:len(args)-1] {
		if slices.Contains(names, a) {
			return args[i+1]
		}
	}
	return ""
}

// edit changes the process in a JSON file.
func edit(file string, process func(map[string]any) map[string]any) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}

	var c map[string]any
	if err := json.Unmarshal(b, &c); err != nil {
		return err
	}

	p := process(c)
	if score, ok := p["oomScoreAdj"].(float64); ok && score < 0 {
		p["oomScoreAdj"] = 0
	}

	caps, _ := p["capabilities"].(map[string]any)
	for set, v := range caps {
		list, _ := v.([]any)
		caps[set] = slices.DeleteFunc(list, func(c any) bool { return c == "CAP_SYS_RESOURCE" })
	}

	limits, _ := p["rlimits"].([]any)
	for _, l := range limits {
		clamp(l)
	}

	if b, err = json.Marshal(c); err != nil {
		return err
	}

	return os.WriteFile(file, b, 0o644)
}

// clamp lowers a limit to this process's own.
func clamp(l any) {
	limit, _ := l.(map[string]any)
	kind, ok := map[any]int{
		"RLIMIT_CPU": 0, "RLIMIT_FSIZE": 1, "RLIMIT_DATA": 2, "RLIMIT_STACK": 3, "RLIMIT_CORE": 4, "RLIMIT_NPROC": 6,
		"RLIMIT_NOFILE": 7, "RLIMIT_MEMLOCK": 8,
	}[limit["type"]]

	var own syscall.Rlimit
	if !ok || syscall.Getrlimit(kind, &own) != nil {
		return
	}

	for _, key := range []string{"soft", "hard"} {
		if v, ok := limit[key].(float64); ok && v > float64(own.Max) {
			limit[key] = own.Max
		}
	}
}
