package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/moby/client"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/proxy"
)

// breaker is one kind of fault. Calling it injects the fault, and the returned function ends it.
// The function is nil for faults without an end.
type breaker func(*trial, *rand.Rand) (end func(), err error)

// processFaults affect processes. They happen one after the other, in parallel with the surrounding
// faults.
var processFaults = map[string]breaker{
	"kill the daemon":     func(r *trial, _ *rand.Rand) (func(), error) { r.killDaemon(); return nil, nil },
	"kill dockerd":        killDockerd,
	"stop dockerd":        stopDockerd,
	"kill containerd":     killContainerd,
	"kill the log-driver": killing(func(p process) bool { return strings.Contains(p.cmdline, " log-driver ") }),
	"kill a shim":         killShim,
	"kill a pause":        killing(func(p process) bool { return p.cgroup != "" && p.name == "pause" }),
	"kill a container":    killing(func(p process) bool { return p.cgroup != "" && p.name != "pause" }),
}

// surroundingFaults affect the daemon's environment.
var surroundingFaults = map[string]breaker{
	"remove a container":       removeContainer,
	"remove the image":         removeImage,
	"remove the pause image":   removePause,
	"remove the bridge":        removeBridge,
	"remove the configuration": func(r *trial, _ *rand.Rand) (func(), error) { return moveAway(r, r.confFile()) },
	"remove a plugin": func(r *trial, random *rand.Rand) (func(), error) {
		return moveAway(r, filepath.Join(r.cni.dir, choose(random, "bridge", "host-local", "portmap")))
	},
	"fill the log disk":     func(r *trial, _ *rand.Rand) (func(), error) { return fillLogs(r) },
	"fill the engine disk":  fillEngine,
	"plugins fail":          answering("fail"),
	"plugins lie":           answering("lie"),
	"plugins print garbage": answering("garbage"),
	"plugins print nothing": answering("nothing"),
	"plugins hang":          answering(hang),
	"delay requests": proxying(func(random *rand.Rand) proxy.Fault {
		return proxy.Fault{Delay: time.Duration(random.IntN(3000)) * time.Millisecond}
	}),
	"cut requests": proxying(func(random *rand.Rand) proxy.Fault {
		return proxy.Fault{Cut: true, After: random.IntN(2) == 0}
	}),
	"answer 500": proxying(func(random *rand.Rand) proxy.Fault {
		return proxy.Fault{Status: http.StatusInternalServerError, After: random.IntN(2) == 0}
	}),
	"truncate answers": proxying(func(random *rand.Rand) proxy.Fault {
		return proxy.Fault{Truncate: 1 + random.IntN(2000)}
	}),
	"answer never": proxying(func(random *rand.Rand) proxy.Fault {
		return proxy.Fault{Hang: true, Late: random.IntN(2) == 0}
	}),
	"silence events":  eventFault(proxy.Fault{Silent: true}),
	"delay events":    eventFault(proxy.Fault{Delay: 500 * time.Millisecond}),
	"truncate events": eventFault(proxy.Fault{Truncate: 1}),
	"cut events":      func(r *trial, _ *rand.Rand) (func(), error) { r.proxy.CutStreams(); return nil, nil },
}

// blinding lists the faults that may hide the engine from the daemon.
var blinding = []string{
	"stop dockerd", "delay requests", "cut requests", "answer 500", "truncate answers", "answer never",
	"silence events", "delay events",
	"truncate events", "reorder events",
}

func choose[T any](random *rand.Rand, all ...T) T { return all[random.IntN(len(all))] }

// errNothing is returned if the fault has no possible target.
var errNothing = errors.New("nothing to hit")

// kill sends SIGKILL to a random matching process.
func (r *trial) kill(random *rand.Rand, fits func(process) bool) error {
	all, err := r.list()
	if err != nil {
		return err
	}

	var fitting []process
	for _, p := range all {
		if fits(p) {
			fitting = append(fitting, p)
		}
	}

	if len(fitting) == 0 {
		return errNothing
	}

	_, err = r.inside("kill", "-KILL", choose(random, fitting...).pid)

	return err
}

func killing(fits func(process) bool) breaker {
	return func(r *trial, random *rand.Rand) (func(), error) { return nil, r.kill(random, fits) }
}

// killContainerd kills containerd; dockerd restarts it.
func killContainerd(r *trial, random *rand.Rand) (func(), error) {
	return nil, r.killContainerd(func() error {
		return r.kill(random, func(p process) bool { return p.name == "containerd" })
	})
}

// killDockerd kills the engine, and containerd with it (PR_SET_PDEATHSIG, prctl(2)). With
// live-restore its containers keep running. Without, it ends them at its next start.
func killDockerd(r *trial, _ *rand.Rand) (func(), error) {
	began := time.Now()
	if err := r.killContainerd(func() error { r.killEngine(); return nil }); err != nil {
		return nil, err
	}

	l := loss{why: "dockerd was killed", from: began, to: time.Now(), bytes: engineBuffer, torn: true}
	if !r.liveRestore {
		if !engines.Within(time.Minute, func() bool { return r.answers() }) {
			return nil, errors.New("dockerd does not restart")
		}
		l.to, l.bytes = time.Now(), 0
	}

	r.lose(l)

	return nil, nil
}

// answers reports whether the engine responds.
func (l *lab) answers() bool {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_, err := l.docker.Ping(ctx, client.PingOptions{})
	return err == nil
}

func stopDockerd(r *trial, _ *rand.Rand) (func(), error) {
	r.processes.Lock() // blocks other kills and starts
	if !r.eng.Running() {
		r.processes.Unlock()
		return nil, errNothing
	}

	r.eng.Signal(r.tb, "STOP")

	return func() {
		defer r.processes.Unlock()
		r.eng.Signal(r.tb, "CONT")
	}, nil
}

// killShim kills a shim. Its containers end, and output held by it is lost.
func killShim(r *trial, random *rand.Rand) (func(), error) {
	began := time.Now()
	err := r.kill(random, isShim)
	r.lose(loss{why: "a shim was killed", from: began, to: time.Now(), torn: true})
	return nil, err
}

func removeContainer(r *trial, random *rand.Rand) (func(), error) {
	ctx, cancel := context.WithTimeout(r.ctx, callTimeout)
	defer cancel()

	l, err := r.docker.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return nil, err
	}

	if len(l.Items) == 0 {
		return nil, errNothing
	}

	r.mu.Lock()
	r.removed = time.Now()
	r.mu.Unlock()
	_, err = r.docker.ContainerRemove(ctx, choose(random, l.Items...).ID, client.ContainerRemoveOptions{Force: true})

	return nil, err
}

func removeImage(r *trial, _ *rand.Rand) (func(), error) {
	_, err := r.inside("docker", "-H", "unix://"+r.eng.Socket, "rmi", "-f", engines.Busybox)
	return func() {
		problems := await(r.ctx, time.Minute, func(context.Context) []string {
			if _, err := r.inside("docker", "-H", "unix://"+r.eng.Socket, "load", "-i", r.saved()); err != nil {
				return []string{err.Error()}
			}
			return nil
		})
		if len(problems) > 0 {
			r.tb.Errorf("the image could not be restored: %q", problems)
		}
	}, err
}

func removePause(r *trial, _ *rand.Rand) (func(), error) {
	docker := "docker -H unix://" + r.eng.Socket
	_, err := r.inside("sh", "-c", docker+" rmi -f $("+docker+" images --format '{{.Repository}}:{{.Tag}}' "+
		"cri-dockerd.local/pause)")
	return nil, err
}

// removeBridge removes the pods' bridge; the plugin creates it again.
func removeBridge(r *trial, _ *rand.Rand) (func(), error) {
	_, err := r.inside("ip", "link", "del", "chaos0")
	return nil, err
}

// moveAway moves a file to another directory until the fault ends.
func moveAway(r *trial, file string) (func(), error) {
	away := filepath.Join(r.eng.Dir, "away-"+filepath.Base(file))
	if err := os.Rename(file, away); err != nil {
		return nil, err
	}

	return func() {
		if err := os.Rename(away, file); err != nil {
			r.tb.Errorf("%v", err)
		}
	}, nil
}

// fill writes to a file system until it is full.
func fill(r *trial, dir string) (func(), error) {
	file := r.filler(dir)
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()

	for piece := make([]byte, 64<<10); len(piece) > 0; {
		if _, err := f.Write(piece); err != nil {
			piece = piece[:len(piece)/2]
		}
	}

	return func() {
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			r.tb.Errorf("%v", err)
		}
	}, nil
}

// fillEngine fills the engine's disk. It waits for a starting dockerd, and a dockerd started
// meanwhile ends the fault: see revive.
func fillEngine(r *trial, _ *rand.Rand) (func(), error) {
	if !engines.Within(time.Minute, r.answers) {
		return nil, errors.New("dockerd is not responding")
	}
	return fill(r, r.eng.DataRoot())
}

func fillLogs(r *trial) (func(), error) {
	began := time.Now()
	end, err := fill(r, r.logs)
	if err != nil {
		return nil, err
	}

	return func() {
		end()
		r.lose(loss{why: "the log disk was full", from: began, to: time.Now()})
	}, nil
}

// answering replaces the answers of plugins, before or after their work.
func answering(answer string) breaker {
	return func(r *trial, random *rand.Rand) (func(), error) {
		after := random.IntN(2) == 0
		name := choose(random, "bridge", "host-local", "portmap")
		command := choose(random, "ADD", "ADD", "DEL")
		if answer == "lie" || answer == "nothing" || answer == "garbage" {
			// A false report of a deletion is undetectable.
			command = "ADD"
		}

		r.cni.answer(func(q question) string {
			if q.Plugin == name && q.Command == command && q.After == after {
				return answer
			}
			return ""
		})

		return func() { r.cni.answer(nil) }, nil
	}
}

// requests lists parts of paths in the engine's API.
var requests = []string{
	"/containers/create", "/start", "/stop", "/kill", "/json", "/containers/json", "/images/", "/exec", "/update",
	"/wait", "/_ping",
}

// proxying breaks the requests of one object, of one operation, or all.
func proxying(fault func(*rand.Rand) proxy.Fault) breaker {
	return func(r *trial, random *rand.Rand) (func(), error) {
		f := fault(random)
		word := "/"
		switch random.IntN(4) {
		case 0:
			word = r.object(random)
		case 1, 2:
			word = choose(random, requests...)
		}

		rare := random.IntN(2) == 0 && !f.Hang // only every third request
		n := uint64(0)
		lot := rand.New(rand.NewPCG(random.Uint64(), 0))
		r.proxy.Break(func(q *http.Request) proxy.Fault { // called under the proxy's lock
			n++
			if !strings.Contains(q.URL.Path, word) || rare && lot.IntN(3) > 0 {
				return proxy.Fault{}
			}
			return f
		})

		return func() { r.proxy.Break(nil) }, nil
	}
}

// object returns the ID of a random container.
func (r *trial) object(random *rand.Rand) string {
	ctx, cancel := context.WithTimeout(r.ctx, callTimeout)
	defer cancel()
	l, err := r.docker.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil || len(l.Items) == 0 {
		return "/"
	}
	return choose(random, l.Items...).ID
}

// eventFault breaks event streams.
func eventFault(f proxy.Fault) breaker {
	return func(r *trial, _ *rand.Rand) (func(), error) {
		r.proxy.Break(func(q *http.Request) proxy.Fault {
			if strings.HasSuffix(q.URL.Path, "/events") && q.URL.Query().Get("until") == "" {
				return f
			}
			return proxy.Fault{}
		})
		return func() { r.proxy.Break(nil) }, nil
	}
}
