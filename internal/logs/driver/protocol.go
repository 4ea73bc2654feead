package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// mediaType is the media type of Docker's plugin protocol.
const mediaType = "application/vnd.docker.plugins.v1.2+json"

// info describes a container, with the required fields of moby's logger.Info.
type info struct {
	Config        map[string]string
	ContainerID   string
	ContainerName string
}

func (i info) target() target {
	return target{Directory: i.Config[OptionDirectory], Path: i.Config[OptionPath]}
}

// Handler serves Docker's plugin protocol, the control API and the metrics.
func (d *Driver) Handler() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("POST /Plugin.Activate", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, map[string]any{"Implements": []string{"LogDriver"}})
	})
	m.HandleFunc("POST /LogDriver.Capabilities", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, map[string]any{"Cap": map[string]bool{"ReadLogs": true}})
	})
	m.HandleFunc("POST /LogDriver.StartLogging", d.startLogging)
	m.HandleFunc("POST /LogDriver.StopLogging", d.stopLogging)
	m.HandleFunc("POST /LogDriver.ReadLogs", d.readLogs)
	m.HandleFunc("POST "+reopenPath, d.reopen)
	m.HandleFunc("GET "+watchPath, d.watch)
	m.Handle("GET "+metricsPath, d.metrics.handler())

	return m
}

const (
	// maxRequest limits a request, in bytes. Docker includes a container's labels and environment,
	// and the image's author controls their size. They are not used here.
	maxRequest = 4 << 20
	// maxParsing limits the number of requests parsed at a time, and thereby the total memory.
	maxParsing = 2
	// bodyTimeout limits the wait for a request body from the engine.
	bodyTimeout = 10 * time.Second
)

// decode reads a request of bounded size into v.
func (d *Driver) decode(w http.ResponseWriter, r *http.Request, v any) error {
	select {
	case d.parsing <- struct{}{}:
		defer func() { <-d.parsing }()
	case <-r.Context().Done():
		return r.Context().Err()
	}

	c := http.NewResponseController(w)
	if err := c.SetReadDeadline(time.Now().Add(bodyTimeout)); err == nil {
		defer func() { _ = c.SetReadDeadline(time.Time{}) }() // a broken connection fails again later
	}

	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(v)
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return fmt.Errorf("the request exceeds %d bytes: "+
			"the labels and the environment of the container are too large", large.Limit)
	}

	return err
}

func (d *Driver) startLogging(w http.ResponseWriter, r *http.Request) {
	var req struct {
		File string
		Info info
	}

	err := d.decode(w, r, &req)
	var e entry
	if err == nil {
		e, err = d.table.newEntry(req.File, req.Info)
	}

	if err == nil {
		err = d.start(r.Context(), e)
	}

	if err != nil {
		if isShortage(err) {
			d.alarms.raise(alarmDescriptors)
		}
		name := text.Clean(req.Info.ContainerName, text.MaxName)
		d.logger.Error("cannot start logging a container", "container", name, "err", err)
	}

	replyError(w, err)
}

func (d *Driver) stopLogging(w http.ResponseWriter, r *http.Request) {
	var req struct{ File string }
	err := d.decode(w, r, &req)
	if err == nil {
		// Write all output received from Docker, even if it no longer waits for the response.
		d.stop(context.WithoutCancel(r.Context()), req.File)
	}
	replyError(w, err)
}

// readLogs streams a container's log to docker logs.
func (d *Driver) readLogs(w http.ResponseWriter, r *http.Request) {
	var req struct {
		Info   info
		Config readConfig
	}

	err := d.decode(w, r, &req)
	var id model.ContainerID
	if err == nil {
		id, err = model.ParseContainerID(req.Info.ContainerID)
	}

	if err == nil {
		err = req.Info.target().check()
	}

	if err != nil {
		http.Error(w, text.Clean(err.Error(), text.MaxMessage), http.StatusBadRequest)
		return
	}

	c := http.NewResponseController(w)
	rd := &reader{
		cfg:   req.Config,
		log:   req.Info.target(),
		out:   w,
		flush: c.Flush,
	}
	if req.Config.Follow {
		rd.live = d.findContainer(id)
	}
	defer rd.close()

	if err = rd.prepare(r.Context()); err == nil {
		w.Header().Set("Content-Type", "application/x-json-stream")
		if err = c.Flush(); err == nil { // Docker waits for the header
			err = rd.copy(r.Context())
		}
	}

	if err != nil && r.Context().Err() == nil {
		name := text.Clean(req.Info.ContainerName, text.MaxName)
		d.logger.Warn("cannot read a container's log", "container", name, "err", err)
	}
}

// The control API for the daemon, version 1. A process of an older release may serve a newer
// daemon. So within a version nothing is removed or changes its meaning.
const (
	controlVersion = 1
	reopenPath     = "/cri-dockerd/v1/reopen"
	watchPath      = "/cri-dockerd/v1/watch"
	metricsPath    = "/metrics"
)

// Status is the state of a driver process.
type Status struct {
	Control int    // version of the control API
	Version string // of the program
	PID     int
	// Alarms describes each shortage and its remedy in a sentence. Watch reports each change.
	Alarms []string `json:",omitempty"`
}

func (d *Driver) status() Status {
	return Status{
		Control: controlVersion,
		Version: d.version,
		PID:     os.Getpid(),
		Alarms:  d.alarms.list(),
	}
}

// reopenRequest requests a new log at a container's path.
type reopenRequest struct{ Container string }

func (d *Driver) reopen(w http.ResponseWriter, r *http.Request) {
	var req reopenRequest
	if err := d.decode(w, r, &req); err != nil {
		http.Error(w, text.Clean(err.Error(), text.MaxMessage), http.StatusBadRequest)
		return
	}

	switch err := d.Reopen(r.Context(), req.Container); {
	case errors.Is(err, ErrUnknown):
		http.Error(w, err.Error(), http.StatusNotFound)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// watch sends the status, and sends it again each time the alarms change, until this process ends.
// So the watcher notices the end at once.
func (d *Driver) watch(w http.ResponseWriter, r *http.Request) {
	c, enc := http.NewResponseController(w), json.NewEncoder(w)
	w.Header().Set("Content-Type", "application/json")
	defer func() {
		now := time.Now()
		d.disconnected.Store(&now)
	}()

	for {
		changed := d.alarms.changed.next() // before the status, so that no change is missed
		if err := errors.Join(enc.Encode(d.status()), c.Flush()); err != nil {
			return
		}

		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

// reply writes a response of the plugin protocol. It ignores errors: an engine that no longer waits
// has ended.
func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", mediaType)
	_ = json.NewEncoder(w).Encode(v)
}

func replyError(w http.ResponseWriter, err error) {
	message := ""
	if err != nil {
		message = text.Clean(err.Error(), text.MaxMessage)
	}
	reply(w, map[string]string{"Err": message})
}
