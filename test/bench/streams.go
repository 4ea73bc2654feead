package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/peer"
)

// streamsCommand runs the program as the benchmark of exec and port-forward.
const streamsCommand = "streams"

const (
	execShare     = 0.8  // of the engine's own exec, in bytes a second
	forwardShare  = 1.0  // of containerd's port-forward, in bytes a second
	execSyncShare = 1.05 // of the engine's own exec, in time
)

// streamsBench runs the benchmark on one engine. Compared variants take turns.
type streamsBench struct {
	h          *harness
	e          *engines.Engine
	docker     *client.Client
	daemon     *engines.Daemon
	ours, peer *streamTarget // the daemon's, and containerd's
	size       int           // of each stream, in bytes
	only       *regexp.Regexp
}

// benchStreams does one run for each engine and reports whether all limits hold.
func benchStreams(ctx context.Context, h *harness, args []string) bool {
	flags := flag.NewFlagSet(streamsCommand, flag.ExitOnError)
	size := flags.Int("megabytes", 200, "size of each stream")
	rounds := flags.Int("rounds", 5, "streams of each kind")
	sessions := flags.Int("sessions", 100, "concurrent sessions, 0 to skip this measurement")
	priority := flags.Bool("priority", false, "run with priority over all other processes, to simulate a quiet "+
		"machine on a busy one")
	only := flags.String("only", "", "regular expression of the streams to measure, together with their baselines")
	if err := flags.Parse(args); err != nil {
		h.Fatalf("bench: %v", err)
	}

	pattern, err := regexp.Compile(*only)
	if err != nil {
		h.Fatalf("bench: -only: %v", err)
	}

	ok := true
	for _, v := range engines.Versions() {
		load := loadAverage(h)
		b := newStreamsBench(ctx, h, v)
		b.size, b.only = *size*1e6, pattern
		if *priority {
			prioritize(h, b.e)
		}

		fmt.Printf("Docker Engine %s, %d streams of %d MB, %d CPUs, load average %s before the run, %s\n\n",
			v, *rounds, *size, runtime.NumCPU(), load, time.Now().UTC().Format(time.DateOnly))
		ok = b.streams(ctx, *rounds) && ok
		ok = (*sessions == 0 || b.measureConcurrent(ctx, *sessions)) && ok
		ok = (!pattern.MatchString("ExecSync") || b.execSyncs(ctx, 200**rounds)) && ok
	}

	return ok
}

func newStreamsBench(ctx context.Context, h *harness, v engines.Version) *streamsBench {
	e := engines.Start(h, v)
	image := e.ImportBusybox(h)
	d := e.Daemon(h, "--log-level=info")
	pin := func(_ context.Context, _ runtimeapi.RuntimeServiceClient, pod string) (string, error) {
		return d.Pin(h, pod), nil
	}

	foreign := peer.Start(ctx, h, e)

	return &streamsBench{
		h:      h,
		e:      e,
		docker: e.Docker(h),
		daemon: d,
		ours:   newStreamTarget(ctx, h, e, "cri-dockerd", d.Runtime, image, pin),
		peer:   newStreamTarget(ctx, h, e, "containerd", foreign.Runtime, foreign.Busybox, peer.NetNS),
	}
}

// prioritize gives this process, all of the engine's namespaces and its containers priority over
// other processes of the machine (sched(7), The autogroup feature). Among each other they run as on
// a quiet machine. A real-time policy would change that.
func prioritize(h *harness, e *engines.Engine) {
	inside := e.Command("sh", "-c",
		`for p in /proc/[0-9]*; do echo -20 > "$p/autogroup" || true; done # ignore ended processes
		[ ! -d /sys/fs/cgroup/cpu ] || echo 262144 > "/sys/fs/cgroup/cpu$1/cpu.shares"`, "sh", e.CgroupParent)
	err := os.WriteFile("/proc/self/autogroup", []byte("-20"), 0)
	if out, commandErr := inside.CombinedOutput(); err != nil || commandErr != nil {
		h.Fatalf("bench: -priority: %v, %v, %s", err, commandErr, out)
	}
}

// variant is a kind of stream with its baseline.
type variant struct {
	name     string
	stream   func(ctx context.Context, bytes int) (int64, error)
	baseline string  // name of another variant, or ""
	share    float64 // minimum share of the baseline's rate, 0 for information only
	times    []time.Duration
	cpu      time.Duration // total CPU of the daemon
	client   time.Duration // total CPU of this process
}

// variants are the rows of the table. With a command printing small pieces, most of the cost is the
// command's own. Large pieces show the cost between the command and the client.
func (b *streamsBench) variants() []*variant {
	large := func(bytes int) []string {
		return []string{"sh", "-c", fmt.Sprintf("exec dd if=/dev/zero bs=100000 count=%d 2>/dev/null", bytes/100000)}
	}
	small := func(bytes int) []string { return []string{"head", "-c", fmt.Sprint(bytes), "/dev/zero"} }
	type stream = func(context.Context, int) (int64, error)
	exec := func(run func(context.Context, []string) (int64, error), cmd func(int) []string) stream {
		return func(ctx context.Context, bytes int) (int64, error) { return run(ctx, cmd(bytes)) }
	}

	return []*variant{
		{name: "the engine's exec", stream: exec(b.engineExec, large)},
		{name: "exec, SPDY", stream: exec(b.ours.execSPDY, large), baseline: "the engine's exec", share: execShare},
		{
			name:     "exec, WebSocket",
			stream:   exec(b.ours.execWebSocket, large),
			baseline: "the engine's exec",
			share:    execShare,
		},
		{name: "containerd's exec, SPDY", stream: exec(b.peer.execSPDY, large), baseline: "the engine's exec"},
		{name: "the engine's exec, small pieces", stream: exec(b.engineExec, small)},
		{
			name:     "exec, SPDY, small pieces",
			stream:   exec(b.ours.execSPDY, small),
			baseline: "the engine's exec, small pieces",
			share:    execShare,
		},
		{
			name:     "exec, WebSocket, small pieces",
			stream:   exec(b.ours.execWebSocket, small),
			baseline: "the engine's exec, small pieces",
			share:    execShare,
		},
		{name: "containerd's port-forward, SPDY", stream: b.peer.forwardSPDY},
		{
			name:     "port-forward, SPDY",
			stream:   b.ours.forwardSPDY,
			baseline: "containerd's port-forward, SPDY",
			share:    forwardShare,
		},
		{name: "containerd's port-forward, WebSocket", stream: b.peer.forwardWebSocket},
		{
			name:     "port-forward, WebSocket",
			stream:   b.ours.forwardWebSocket,
			baseline: "containerd's port-forward, WebSocket",
			share:    forwardShare,
		},
	}
}

// selected returns the requested variants and their baselines, except for names containing not.
func (b *streamsBench) selected(not string) (selected []*variant) {
	all := b.variants()
	wanted := map[string]bool{}
	for _, w := range all {
		if b.only.MatchString(w.name) && (not == "" || !strings.Contains(w.name, not)) {
			wanted[w.name], wanted[w.baseline] = true, true
		}
	}

	return slices.DeleteFunc(all, func(w *variant) bool { return !wanted[w.name] })
}

// streams measures one stream at a time and prints the table.
func (b *streamsBench) streams(ctx context.Context, rounds int) bool {
	variants := b.selected("")
	for i := range rounds {
		turn := slices.Clone(variants)
		if i%2 == 1 {
			slices.Reverse(turn)
		}
		for _, w := range turn {
			b.measure(ctx, w, 1, b.size)
		}
	}

	return printVariants(variants, float64(b.size))
}

// measureConcurrent measures many concurrent sessions. Each transfers its part of the bytes.
func (b *streamsBench) measureConcurrent(ctx context.Context, sessions int) bool {
	variants := b.selected("small pieces")
	for i := range 3 {
		turn := slices.Clone(variants)
		if i%2 == 1 {
			slices.Reverse(turn)
		}
		for _, w := range turn {
			b.measure(ctx, w, sessions, max(1e6, b.size/sessions/1e6*1e6))
		}
	}

	fmt.Printf("%d sessions at once:\n\n", sessions)

	return printVariants(variants, float64(sessions*max(1e6, b.size/sessions/1e6*1e6)))
}

// measure runs concurrent sessions of the given number of bytes. All bytes must arrive.
func (b *streamsBench) measure(ctx context.Context, w *variant, sessions, bytes int) {
	g, ctx := errgroup.WithContext(ctx)
	cpu, client := b.daemon.CPU(b.h), ownCPU(b.h)
	begin := time.Now()
	for range sessions {
		g.Go(func() error {
			n, err := w.stream(ctx, bytes)
			if err == nil && n != int64(bytes) {
				err = fmt.Errorf("%d of %d bytes arrived", n, bytes)
			}
			return err
		})
	}

	if err := g.Wait(); err != nil {
		b.h.Fatalf("bench: %s, %d at once: %v", w.name, sessions, err)
	}

	w.times = append(w.times, time.Since(begin))
	w.cpu += b.daemon.CPU(b.h) - cpu
	w.client += ownCPU(b.h) - client
}

// printVariants prints rates in MB/s and their shares. A share is the median of the shares of all
// rounds.
func printVariants(variants []*variant, bytes float64) bool {
	ok := true
	fmt.Println("| stream | MB/s, median | share | of | limit | verdict | CPU of the daemon, client (ms/MB) |\n" +
		"|---|---:|---:|---|---|---|---|")
	for _, w := range variants {
		used := func(cpu time.Duration) float64 { return cpu.Seconds() * 1e9 / bytes / float64(len(w.times)) }
		cpu := fmt.Sprintf("%.1f, %.1f", used(w.cpu), used(w.client))
		rate := bytes / 1e6 / quantile(w.times, 50).Seconds()
		i := slices.IndexFunc(variants, func(o *variant) bool { return o.name == w.baseline })
		if i < 0 {
			fmt.Printf("| %s | %.0f | | | | | %s |\n", w.name, rate, cpu)
			continue
		}

		var shares []float64
		for r := range w.times {
			shares = append(shares, variants[i].times[r].Seconds()/w.times[r].Seconds())
		}

		slices.Sort(shares)
		share, limit, verdict := shares[len(shares)/2], "", ""
		if w.share > 0 {
			limit, verdict = fmt.Sprintf("≥ %.2f", w.share), "pass"
			if share < w.share {
				verdict, ok = "FAIL", false
			}
		}

		fmt.Printf("| %s | %.0f | %.2f | %s | %s | %s | %s |\n", w.name, rate, share, w.baseline, limit, verdict, cpu)
	}

	fmt.Println()

	return ok
}

// execSyncs compares ExecSync with the engine's own exec: create, start, wait, inspect.
func (b *streamsBench) execSyncs(ctx context.Context, calls int) bool {
	var ours, theirs []time.Duration
	for range calls {
		begin := time.Now()
		if _, err := b.ours.runtime.ExecSync(ctx,
			&runtimeapi.ExecSyncRequest{ContainerId: b.ours.id, Cmd: []string{"/bin/true"}}); err != nil {
			b.h.Fatalf("bench: ExecSync: %v", err)
		}

		ours = append(ours, time.Since(begin))
		begin = time.Now()
		if _, err := b.engineExec(ctx, []string{"/bin/true"}); err != nil {
			b.h.Fatalf("bench: exec: %v", err)
		}

		theirs = append(theirs, time.Since(begin))
	}

	// The median of the differences of adjacent samples cancels machine noise.
	floor := quantile(theirs, 50)
	share := 1 + quantile(differences(ours, theirs), 50).Seconds()/floor.Seconds()
	verdict := "pass"
	if share > execSyncShare {
		verdict = "FAIL"
	}

	fmt.Println("| /bin/true | p50 | n | of the engine's exec | limit | verdict |\n|---|---:|---:|---:|---|---|")
	fmt.Printf("| the engine's exec | %s | %d | | | |\n", ms(quantile(theirs, 50)), calls)
	fmt.Printf("| ExecSync | %s | %d | %.2f | ≤ %.2f | %s |\n\n", ms(quantile(ours, 50)), calls, share, execSyncShare,
		verdict)

	return verdict == "pass"
}

// engineExec runs a command like "docker exec" and returns the size of its output in bytes.
func (b *streamsBench) engineExec(ctx context.Context, cmd []string) (int64, error) {
	x, err := b.docker.ExecCreate(ctx, b.ours.id, client.ExecCreateOptions{
		Cmd:          cmd,
		AttachStdout: true,
		AttachStderr: true,
	})
	if err != nil {
		return 0, err
	}

	conn, err := b.docker.ExecAttach(ctx, x.ID, client.ExecAttachOptions{})
	if err != nil {
		return 0, err
	}
	defer conn.Close()

	n, err := stdcopy.StdCopy(io.Discard, io.Discard, conn.Reader)
	if err != nil {
		return n, err
	}

	in, err := b.docker.ExecInspect(ctx, x.ID, client.ExecInspectOptions{})
	if err == nil && in.ExitCode != 0 {
		err = fmt.Errorf("exit code %d", in.ExitCode)
	}

	return n, err
}
