package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Parameters of the drills.
const (
	probeRate     = 200              // exec probes due each second
	probesFor     = 10 * time.Second // duration of the probes
	probesAtOnce  = 100              // concurrent probes; a kubelet has one goroutine per probe
	followerCount = 500
	followedCount = 5 // containers to follow
	followedLines = 400
	stalledCalls  = 50 // calls of the client without reads
	slowLives     = 20 // containers run while an event reader is slow
	// busyStatus limits Status while a drill uses all CPUs.
	busyStatus = 500 * time.Millisecond
)

// withStatusCalls runs a drill and measures Status meanwhile.
func (l *loadBench) withStatusCalls(ctx context.Context, name string, do func(context.Context) error) error {
	done := make(chan struct{})
	var took []time.Duration
	g, groupCtx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(done)
		return do(groupCtx)
	})

	g.Go(func() error {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()

		for {
			select {
			case <-done:
				return nil
			case <-tick.C:
			}

			begin := time.Now()
			if _, err := l.daemon.Runtime.Status(ctx, &runtimeapi.StatusRequest{}); err != nil {
				return err
			}

			took = append(took, time.Since(begin))
		}
	})

	err := g.Wait()
	p99 := quantile(took, 99)
	l.table.add(name+": Status, p99", ms(p99), "≤ "+ms(busyStatus), p99 <= busyStatus)

	return err
}

// runProbes runs exec probes at a rate the machine may not sustain. Like a kubelet it skips probes
// due while the previous ones are still running.
func (l *loadBench) runProbes(ctx context.Context) error {
	var done, skipped atomic.Int64
	var mu sync.Mutex
	var took []time.Duration
	err := l.withStatusCalls(ctx, "exec probes", func(ctx context.Context) error {
		g, groupCtx := errgroup.WithContext(ctx)
		g.SetLimit(probesAtOnce)
		tick := time.NewTicker(time.Second / probeRate)
		defer tick.Stop()

		for i, begin := 0, time.Now(); time.Since(begin) < probesFor; i++ {
			<-tick.C
			p := l.pods[i%len(l.pods)]
			if !g.TryGo(func() error {
				begin := time.Now()
				r, err := l.daemon.Runtime.ExecSync(groupCtx, &runtimeapi.ExecSyncRequest{
					ContainerId: p.container,
					Cmd:         []string{"echo", p.container},
					Timeout:     60,
				})
				if err == nil && strings.TrimSpace(string(r.Stdout)) != p.container {
					err = fmt.Errorf("a probe of %s got %q", p.container, r.Stdout)
				}

				done.Add(1)
				mu.Lock()
				defer mu.Unlock()

				took = append(took, time.Since(begin))

				return err
			}) {
				skipped.Add(1)
			}
		}

		return g.Wait()
	})

	l.table.add(fmt.Sprintf("exec probes, %d due each second", probeRate),
		fmt.Sprintf("%d done, %d skipped, p50 %s", done.Load(), skipped.Load(), ms(quantile(took, 50))), "no error",
		err == nil)

	return err
}

// runFollowers makes very many clients follow few logs. Each must receive every line.
func (l *loadBench) runFollowers(ctx context.Context) error {
	script := fmt.Sprintf("sleep 3; for i in $(seq 1 %d); do echo line $i; [ $((i %% 40)) != 0 ] || sleep 0.2; "+
		"done; sleep 1", followedLines)
	pod, err := l.pod(ctx, "followed", []string{"sleep", "100000"})
	if err != nil {
		return err
	}

	l.pods = append(l.pods, pod)
	var ids []string
	for i := range followedCount {
		id, err := l.container(ctx, pod, fmt.Sprintf("talker-%d", i), []string{"sh", "-c", script})
		if err != nil {
			return err
		}
		ids = append(ids, id)
	}

	var short atomic.Int64
	begin := time.Now()
	err = l.withStatusCalls(ctx, "log followers", func(ctx context.Context) error {
		g, groupCtx := errgroup.WithContext(ctx)
		for i := range followerCount {
			g.Go(func() error {
				n, err := l.follow(groupCtx, ids[i%len(ids)])
				if n != followedLines {
					short.Add(1)
				}
				return err
			})
		}

		return g.Wait()
	})

	l.table.add(fmt.Sprintf("%d log followers, each gets %d lines", followerCount, followedLines),
		fmt.Sprintf("%d got fewer, %s", short.Load(), time.Since(begin).Round(time.Millisecond)), "none",
		err == nil && short.Load() == 0)

	return err
}

// follow returns the number of lines received by one follower.
func (l *loadBench) follow(ctx context.Context, id string) (lines int, err error) {
	r, err := l.docker.ContainerLogs(ctx, id, client.ContainerLogsOptions{ShowStdout: true, Follow: true})
	if err != nil {
		return 0, err
	}
	defer r.Close()

	out, in := io.Pipe()
	go func() {
		_, err := stdcopy.StdCopy(in, io.Discard, r)
		in.CloseWithError(err)
	}()

	s := bufio.NewScanner(out)
	for s.Scan() {
		if lines++; s.Text() != fmt.Sprintf("line %d", lines) {
			return lines, fmt.Errorf("line %d is %q", lines, s.Text())
		}
	}

	return lines, s.Err()
}

// stalledConn is a connection without reads after stalled is set.
type stalledConn struct {
	net.Conn
	stalled *atomic.Bool
	end     <-chan struct{}
}

// Read implements net.Conn.
func (c stalledConn) Read(b []byte) (int, error) {
	if c.stalled.Load() {
		<-c.end
		return 0, net.ErrClosed
	}
	return c.Conn.Read(b)
}

// runStalledClient makes calls with large responses and never reads these.
func (l *loadBench) runStalledClient(ctx context.Context) error {
	var stalled atomic.Bool
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	conn, err := grpc.NewClient("unix://"+l.daemon.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "unix", strings.TrimPrefix(addr, "unix://"))
			return stalledConn{c, &stalled, ctx.Done()}, err
		}))
	if err != nil {
		return err
	}
	defer conn.Close()

	r := runtimeapi.NewRuntimeServiceClient(conn)
	if _, err := r.Version(ctx, &runtimeapi.VersionRequest{}); err != nil {
		return err
	}

	stalled.Store(true)
	var wg sync.WaitGroup
	for range stalledCalls {
		wg.Go(func() { _, _ = r.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{}) })
		wg.Go(func() { _, _ = r.ListContainers(ctx, &runtimeapi.ListContainersRequest{}) })
	}

	err = l.withStatusCalls(ctx, "a client without reads", func(ctx context.Context) error {
		return pauseFor(ctx, 5*time.Second)
	})
	rss := l.daemon.RSS(l.h)
	l.table.add("a client without reads: memory of the daemon (RSS)", fmt.Sprintf("%.1f MiB", float64(rss)/(1<<20)),
		"", true)
	cancel()
	conn.Close()
	wg.Wait()

	return err
}

func pauseFor(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// runSlowReader reads one event per second, and reads all events in another client, while
// containers start and stop.
func (l *loadBench) runSlowReader(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	slow, err := l.daemon.Runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		return err
	}

	quick, err := l.daemon.Runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		return err
	}

	go func() {
		for {
			if _, err := slow.Recv(); err != nil || pauseFor(ctx, time.Second) != nil {
				return
			}
		}
	}()

	var seen []string
	received := make(chan error, 1)
	go func() {
		for deleted := 0; deleted < slowLives; {
			e, err := quick.Recv()
			if err != nil {
				received <- err
				return
			}

			if e.ContainerEventType == runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT {
				seen, deleted = append(seen, e.ContainerId), deleted+1
			}
		}

		received <- nil
	}()

	var created []string
	err = l.withStatusCalls(ctx, "a slow event reader", func(ctx context.Context) error {
		for i := range slowLives {
			id, err := l.container(ctx, l.pods[0], fmt.Sprintf("brief-%d", i), []string{"true"})
			if err == nil {
				created = append(created, id)
				_, err = l.daemon.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
			}

			if err != nil {
				return err
			}
		}

		return nil
	})
	if err != nil {
		return err
	}

	select {
	case err = <-received:
	case <-time.After(time.Minute):
		err = errors.New("the other reader did not receive all events")
	}

	slices.Sort(seen)
	slices.Sort(created)
	l.table.add("a slow event reader: deletions received by another reader",
		fmt.Sprintf("%d of %d", len(seen), len(created)), "all", err == nil && slices.Equal(seen, created))

	return err
}
